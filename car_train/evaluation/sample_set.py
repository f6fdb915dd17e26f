"""The papers' protocol: N images of every class, drawn by a plan or a checkpoint, as a set against the real ones.

VAR (section 4.1) and CAR (section 4.1) draw 50 images of each ImageNet class. Image k of all is drawn with seed
`seed + k`, by the runtime and by PyTorch from the same uniform numbers. With a control branch a class's images follow
the controls of its real images in turn. `--baseline` draws each again without, of the same class and seed.

`--reject P` draws 1/(1 − P) times as many and keeps of each class those that a classifier takes for it with most
confidence, as VAR's d30-re: EfficientNet-Lite0's own classes for a model of 1000, which are taken for ImageNet's;
else linear discriminant analysis of its features on the training images of `--data`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from car_train.data.dataset import ControlledImages, select_classes
from car_train.data.folder import some, text_of
from car_train.evaluation.controls import control_maker
from car_train.evaluation.draw import Drawing, Request, control_of, drawing, parts_of, read_png
from car_train.evaluation.features import EfficientNetLite0, FeatureNetwork, Inception
from car_train.evaluation.metrics import IS_PARTS, control_errors, inception_score, ratios
from car_train.evaluation.options import EvalOptions, EvaluationError, require
from car_train.evaluation.reference import Reference, read_reference
from car_train.evaluation.sets import compare_sets
from car_train.evaluation.targets import Target
from car_train.images import save_png, to_pixels

PER_CLASS = 50
MOST_IMAGES = 10_000_000
"""Of an evaluation; the paper's has 50,000."""
IMAGENET_CLASSES = 1000
TRAINING_IMAGES = 100
"""Training images of a class, at most, that a classifier for `--reject` is fitted to."""
BATCH = 32

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Report = dict[str, Any]
Classifier = Callable[[Floats], Floats]
"""Features [N, D] → log-probabilities of the classes up to a constant, [N, classes]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which images are drawn: requests with the real image that each belongs to (−1: none) and its class."""

    requests: tuple[Request, ...]
    without: tuple[Request, ...]
    """The same requests without their control, for `--baseline`; else ()."""
    labels: NDArray[np.intp]
    owners: NDArray[np.intp]
    per_class: int
    """Images of each class that stay."""


def open_real(target: Target, options: EvalOptions, split: str | None = None) -> ControlledImages | None:
    """The real images of `--data` and `--classes`, or None without it; with `split` those of all classes, for a
    classifier. Raises EvaluationError, DataError.
    """
    require(
        options.data is not None or target.control_type is None,
        f"{target.name} follows a control, and there is nothing to take any from; give --data",
    )
    if options.data is None:
        return None
    data = ControlledImages(
        options.data,
        target.image_size,
        split=split or options.split,
        control_type=target.control_type if split is None else None,
        convention=target.convention if split is None else None,
        fit=options.fit,
        control_root=options.control_root if split is None else None,
        classes=options.classes if split is None else None,
        preload=False,
    )
    names = data.class_names
    require(
        len(names) == target.classes and (target.class_names is None or tuple(names) == target.class_names),
        f"{options.data} has {len(names)} classes ({', '.join(names[:3])}, …), {target.name} {target.classes}; "
        "give a folder of the model's classes",
    )
    return data


def choose(target: Target, real_images: RealImages, options: EvalOptions, folder: Path, notes: list[str]) -> Plan:
    """The requests of all classes. folder: where the controls of the real images stand."""
    labels, known = real_images.labels, target.class_names or real_images.class_names
    wanted = select_classes(options.classes, known or [str(i) for i in range(target.classes)])
    keep = options.per_class or PER_CLASS
    require(keep <= MOST_IMAGES, f"per_class is more than {MOST_IMAGES:,}; give fewer")
    count = math.ceil(round(keep / (1 - options.reject), 6))
    real = defaultdict(list)
    for i, label in enumerate(labels):
        real[label].append(i)
    requests: list[Request] = []
    chosen, owners = [], []
    without = [label for label in wanted if target.control_type is not None and not real[label]]
    if without:
        notes.append(
            f"{len(without)} of {len(wanted)} classes have no real image, so no control, and are left out: "
            f"{', '.join(known[label] if known else str(label) for label in without[:20])}"
            f"{', …' if len(without) > 20 else ''}; --split all takes training images, too"
        )
    wanted = [label for label in wanted if label not in without]
    require(
        len(wanted) * count <= MOST_IMAGES,
        f"{count:,} images of each of {len(wanted)} classes are more than {MOST_IMAGES:,}; give fewer, "
        "or a smaller --reject",
    )
    for label in wanted:
        for k in range(count):
            owner = real[label][k % len(real[label])] if real[label] else -1
            control = str(folder / "controls" / f"{owner}.png") if target.control_type is not None else None
            requests.append({target.control_key: control, "class": label, "seed": options.seed + len(requests)})
            chosen.append(label)
            owners.append(owner)
    require(
        bool(requests), f"no class of {target.name} has a real image in split {options.split!r}; give --split all"
    )
    bare = [{**request, target.control_key: None} for request in requests] if options.baseline else []
    return Plan(
        requests=tuple(requests),
        without=tuple(bare),
        labels=np.array(chosen),
        owners=np.array(owners, np.intp),
        per_class=keep,
    )


class RealImages:
    """The real images in batches, read once: pixels, and controls as files where the model has any."""

    def __init__(self, data: ControlledImages | None, reference: Reference | None):
        self.data, self.reference = data, reference

    @property
    def labels(self) -> list[int]:
        return [] if self.data is None else [label for _, label in self.data.files]

    @property
    def class_names(self) -> list[str] | None:
        return None if self.data is None else self.data.class_names

    def batches(self, controls: Path | None) -> Iterator[Pixels]:
        """Images of the reference, or else of the data. controls: folder for the data's control maps."""
        if controls is not None:
            controls.mkdir(exist_ok=True)
            assert self.data is not None
            for i in tqdm(range(len(self.data)), "controls", unit="img", file=sys.stderr, disable=None):
                save_png(Image.fromarray(self.data[i]["control"].numpy()), controls / f"{i}.png")
        images = None if self.reference is None else self.reference.images
        count = len(images) if images is not None else 0 if self.data is None else len(self.data)
        for start in tqdm(range(0, count, BATCH), "real images", unit="batch", file=sys.stderr, disable=None):
            stop = min(start + BATCH, count)
            if images is not None:
                yield images[start:stop]
            else:
                assert self.data is not None
                yield to_pixels(torch.stack([self.data[i]["image"] for i in range(start, stop)]))


def evaluate_samples(
    target: Target,
    options: EvalOptions,
    samples: Path,
    *,
    features: FeatureNetwork | None = None,
    inception: Inception | None = None,
) -> Report:
    """Draw, write `samples`, measure; the report has no numbers that JSON doesn't have, but perhaps NaN.

    Raises EvaluationError, DataError, BusyError and OSError; what was drawn until then stays for `--resume`.
    """
    began, notes = time.monotonic(), list[str]()
    seconds: dict[str, float] = {}
    reference = _reference(target, options, samples, features, inception, notes)
    require(
        options.controls is None or target.control_type is not None,
        f"{target.name} follows no control; leave out --controls",
    )
    require(
        not options.baseline or target.control_type is not None,
        f"{target.name} follows no control, so it is its own baseline; leave out --baseline",
    )
    real = RealImages(open_real(target, options), reference)
    plan = choose(target, real, options, parts_of(samples).absolute(), notes)
    networks: dict[str, FeatureNetwork] = {} if features is None else {"features": features}
    networks |= {} if inception is None else {"inception": inception}
    requests = (*plan.requests, *plan.without)
    with drawing(samples, _settings(target, options, real), requests, options.resume) as parts:
        classifier = None if options.reject == 0 else _classifier(target, options, features, plan)
        controls = parts.folder / "controls" if target.control_type is not None else None
        real_banks = _described(networks, real.batches(controls))
        seconds["real images"] = time.monotonic() - began
        began_drawing = time.monotonic()
        threads = options.threads or max(1, torch.get_num_threads() // options.processes)
        parts.draw(target, options.processes, threads)
        seconds["drawing"] = time.monotonic() - began_drawing

        began_measuring = time.monotonic()
        made = _described(networks, parts.images())
        count = len(plan.requests)
        base = {name: rows[count:] for name, rows in made.items() if plan.without}
        made = {name: rows[:count] for name, rows in made.items()}
        keep = _kept(plan, made.get("features"), classifier)
        parts.write(samples, keep)
        if options.controls is not None:
            parts.write_controls(options.controls, keep)
        report = {
            "samples": {"file": samples.name, "images": len(keep), "drawn": len(plan.requests)},
            **_distributions(plan, keep, made, base, real_banks, networks, reference, options, notes),
        }
        if target.convention is not None:
            report["control"], per_class = _followed(plan, keep, parts, target, options)
            report["classes"] = {_name(target, label): row for label, row in per_class.items()}
        seconds["measuring"] = time.monotonic() - began_measuring
    return {
        "format": 1,
        target.kind: {"name": target.name, "sha256": dict(target.digests), "control": target.control_type},
        "data": {
            "name": None if options.data is None else text_of(options.data.expanduser().resolve().name),
            "reference": None if options.reference is None else options.reference.name,
            "split": options.split,
            "pictures": len(real.labels) if reference is None or reference.images is None else None,
            "classes": options.classes or "all",
        },
        "options": {
            "seed": options.seed,
            "per_class": plan.per_class,
            "reject": options.reject,
            "branch": options.branch,
            "tolerance": options.tolerance,
            **asdict(target.sampling),
            "backend": options.backend if target.kind == "plan" else None,
            "processes": options.processes,
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        **report,
        "notes": notes,
        "seconds": {k: round(v, 1) for k, v in {**seconds, "all": time.monotonic() - began}.items()},
    }


def _reference(
    target: Target,
    options: EvalOptions,
    samples: Path,
    features: FeatureNetwork | None,
    inception: Inception | None,
    notes: list[str],
) -> Reference | None:
    """The reference of the options, which all that is computed later can be compared with. Raises EvaluationError."""
    if inception is not None and inception.spatial and options.reference is None:
        notes.append("sFID without a reference: of the data's own images")
    if options.reference is None:
        return None
    for file, flag in ((samples, "samples"), (options.controls, "controls")):
        require(
            file is None or not (file.exists() and file.samefile(options.reference)),
            f"the {flag} {file} would replace the reference; give another --{flag}",
        )
    found = read_reference(options.reference)
    require(
        inception is not None or (found.images is not None and features is not None),
        f"{options.reference}: nothing is there to compare it with; give --inception"
        + ("" if found.images is None else ", or leave out --features none"),
    )
    if inception is not None:
        inception.check_statistics(found.pool, found.spatial)
    side = target.image_size
    if found.images is not None and found.images.shape[1:3] != (side, side):
        height, width = found.images.shape[1:3]
        notes.append(
            f"the reference's images are {width}×{height}, the drawn ones {side}×{side}: distances have that in them"
        )
    return found


def _settings(target: Target, options: EvalOptions, real: RealImages) -> dict[str, Any]:
    """What the drawn images depend on."""
    return {
        "digests": target.digests,
        "sampling": asdict(target.sampling),
        "backend": options.backend if target.kind == "plan" else options.device,
        "branch": options.branch,
        "data": None if real.data is None else real.data.fingerprint(),
        "convention": None if target.convention is None else asdict(target.convention),
        "control_root": None if options.control_root is None else str(options.control_root.expanduser().resolve()),
        **{k: getattr(options, k) for k in ("classes", "per_class", "reject", "seed", "fit", "split")},
    }


def _described(networks: dict[str, FeatureNetwork], batches: Iterator[Pixels]) -> dict[str, Floats]:
    """The features of all images by network, [N, D] each; {} without an image."""
    found: dict[str, list[Floats]] = defaultdict(list)
    for images in batches:
        for name, network in networks.items():
            found[name].append(network(images))
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _kept(plan: Plan, made: Floats | None, classifier: Classifier | None) -> list[int]:
    """The places of the images that stay: of each class the `per_class` of most confidence."""
    if classifier is None:
        return list(range(len(plan.requests)))
    assert made is not None
    logits = classifier(made)
    log_p = logits - logits.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    return most_confident(log_p[np.arange(len(made)), plan.labels], plan.labels, plan.per_class)


def most_confident(confidence_N: Floats, label_N: NDArray[np.intp], per_class: int) -> list[int]:
    """Places of the `per_class` most confident images of each class, ascending; of equals the first."""
    kept: list[int] = []
    for label in np.unique(label_N):
        places = np.flatnonzero(label_N == label)
        kept += places[np.argsort(-confidence_N[places], kind="stable")[:per_class]].tolist()
    return sorted(kept)


def _classifier(target: Target, options: EvalOptions, network: FeatureNetwork | None, plan: Plan) -> Classifier:
    """EfficientNet's own of ImageNet, else linear discriminant analysis of training images."""
    require(network is not None, "--reject needs a classifier; leave out --features none")
    assert network is not None
    if target.classes == IMAGENET_CLASSES and isinstance(network, EfficientNetLite0):
        return network.logits
    require(
        options.data is not None,
        f"--reject: {target.name} has {target.classes} classes, which the classifier learns; give --data",
    )
    data = open_real(target, options, split="train")
    assert data is not None
    names, labels = data.class_names, {label for _, label in data.files}
    without = [names[label] for label in sorted(set(plan.labels.tolist()) - labels)]
    require(
        len(labels) > 1 and not without,
        f"--reject: {options.data} has training images of {len(labels)} classes"
        + (f", none of {some(without, ', ')}" if without else "")
        + "; the classifier needs those of two and of all that are drawn",
    )
    return discriminant(data, network, options.seed, target.classes)


def discriminant(data: ControlledImages, network: FeatureNetwork, seed: int, classes: int) -> Classifier:
    """Linear discriminant analysis of the features of at most `TRAINING_IMAGES` images of each class."""
    try:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    except ImportError as error:
        raise EvaluationError(f"--reject needs {error.name}; install `car-deploy[lab]`") from error
    left: dict[int, int] = defaultdict(lambda: TRAINING_IMAGES)
    chosen: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(data)).tolist():
        label = data.files[i][1]
        left[label] -= 1
        chosen += [i] if left[label] >= 0 else []
    rows, labels = [], []
    for start in tqdm(range(0, len(chosen), BATCH), "classifier", unit="batch", file=sys.stderr, disable=None):
        items = [data[i] for i in chosen[start : start + BATCH]]
        rows.append(network(to_pixels(torch.stack([item["image"] for item in items]))))
        labels += [item["label"] for item in items]
    # Shrinkage by Ledoit and Wolf: there may be fewer images than the 1280 features.
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(np.concatenate(rows), labels)

    def classify(made_ND: Floats) -> Floats:
        found = model.decision_function(made_ND)
        logits = np.full((len(made_ND), classes), -np.inf)
        # Of two classes it is the second one's advantage alone.
        logits[:, model.classes_] = found if found.ndim == 2 else np.stack([np.zeros(len(found)), found], 1)
        return logits

    return classify


def _distributions(
    plan: Plan,
    keep: list[int],
    made: dict[str, Floats],
    base: dict[str, Floats],
    real: dict[str, Floats],
    networks: dict[str, FeatureNetwork],
    reference: Reference | None,
    options: EvalOptions,
    notes: list[str],
) -> Report:
    """What the sets of images come to, by network."""
    out: Report = {}
    if "features" in networks:
        network, bank = networks["features"], made["features"][keep]
        found: Report = dict(network.about)
        if "features" in real:
            paired = reference is None or reference.images is None
            owners = plan.owners[keep] if paired else np.arange(len(keep)) % len(real["features"])
            sets = {"truth": real["features"], "generated": bank}
            sets |= {"base": base["features"][keep]} if base else {}
            found |= compare_sets(sets, options.seed, notes, owners)
        else:
            notes.append("no real images, so no Fréchet distance, KID, precision or recall on these features")
        if isinstance(network, EfficientNetLite0) and len(bank) >= IS_PARTS:
            shuffled = np.random.default_rng([options.seed, 4]).permutation(len(bank))
            row = found.setdefault("generated", {})
            row["inception_score"], row["inception_score_std"] = inception_score(network.logits(bank[shuffled]))
        out["distribution"] = found
    if "inception" in networks:
        network = networks["inception"]
        assert isinstance(network, Inception)
        pool, spatial = (None, None) if reference is None else (reference.pool, reference.spatial)
        out["inception"] = dict(network.about)
        for source, rows in (("generated", made), ("base", base)):
            if rows:
                scores = network.scores(real.get("inception"), rows["inception"][keep], pool, spatial)
                out["inception"][source] = scores
    return out


def _followed(
    plan: Plan, keep: list[int], parts: Drawing, target: Target, options: EvalOptions
) -> tuple[Report, dict[int, Report]]:
    """How well the kept images follow their controls, of all and of each class; those drawn without the control, and
    those with another's, which is chance.
    """
    assert target.convention is not None
    maker, made_by = control_maker(target.convention, options)
    count = len(plan.requests)
    kept, place = {*keep, *(count + i for i in keep)}, 0
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    labels: list[int] = []
    others = strangers(plan.labels, plan.owners)
    bar = tqdm(total=len(parts.requests), desc="controls", unit="img", file=sys.stderr, disable=None)
    with bar:
        for images in parts.images():
            places = [i for i in range(place, place + len(images)) if i in kept]
            found = maker([images[i - place] for i in places]) if places else []
            for i, map_found in zip(places, found, strict=True):
                if i < count:
                    labels.append(int(plan.labels[i]))
                    asked = {"generated": i} | ({} if others is None else {"shuffled": others[i]})
                else:
                    asked = {"base": i - count}
                for source, at in asked.items():
                    given = read_png(control_of(plan.requests[at]))
                    errors = control_errors(target.convention, given, map_found, options.tolerance)
                    for measure, error in errors.items():
                        rows[source][measure].append(error)
            place += len(images)
            bar.update(len(images))
    report: Report = {"type": target.control_type, "made_by": made_by}
    means = {source: {m: _mean(v) for m, v in columns.items()} for source, columns in rows.items()}
    report |= {source: means[source] for source in ("generated", "base", "shuffled") if source in means}
    if "base" in means:
        report["generated_over_base"] = ratios(means["generated"], means["base"])
    each = np.array(labels)
    classes = {
        int(label): {
            "pictures": int((each == label).sum()),
            **{f"generated_{m}": _mean(np.array(v)[each == label]) for m, v in rows["generated"].items()},
        }
        for label in np.unique(each)
    }
    return report, classes


def strangers(label_N: NDArray[np.intp], owner_N: NDArray[np.intp]) -> list[int] | None:
    """For each image, which stand class by class, another whose control is another real image's: of another class
    where there is one. None: all have the same control.
    """
    count = len(label_N)
    if len(np.unique(label_N)) > 1:
        return np.roll(np.arange(count), -(count // 2)).tolist()
    if len(np.unique(owner_N)) == 1:
        return None
    return [
        next(j % count for j in range(i + 1, i + count) if owner_N[j % count] != owner_N[i]) for i in range(count)
    ]


def _mean(values: Sequence[float] | Floats) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else None


def _name(target: Target, label: int) -> str:
    return str(label) if target.class_names is None else target.class_names[label]
