"""Do the numbers of a manifest agree? Every port and constant against the model's sizes, and what the buffers take.

The runtime allocates by the manifest and hands the buffers to graphs: a port of another size would be read or written
past its end. Letters as in docs/reference/plan-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from car_runtime.format.schema import FUSIONS, WEIGHTS, Manifest, Port

SPARE_BYTES = 512 * 1024 * 1024
"""One image's buffers take at most this and `BUFFERS_PER_WEIGHTS` times the bytes of weights.bin.

A d16's take 270 MB, and its weights 2.5 GB.
"""
BUFFERS_PER_WEIGHTS = 8
Shape = tuple[int | None, ...]
"""None: a dimension that may have any size."""


def problem_with_sizes(
    manifest: Manifest, spare_bytes: int = SPARE_BYTES, per_weights: int = BUFFERS_PER_WEIGHTS
) -> str | None:
    """What disagrees first; None if nothing does."""
    return next(iter(_problems(manifest, spare_bytes + per_weights * manifest.files[WEIGHTS].bytes)), None)


def _problems(manifest: Manifest, limit: int) -> Iterator[str]:
    expected = _expected(manifest) if manifest.format == 1 else _expected_of_2(manifest)
    for graph_name, graph in manifest.graphs.items():
        ports = expected.get(_kind(graph_name, expected), {})
        for side in (graph.inputs, graph.outputs):
            for port in side:
                if port.name in ports and not _fits(port, *ports[port.name]):
                    dtype, shape = ports[port.name]
                    yield (
                        f"graphs.{graph_name} has {port.name} as {port.dtype} {list(port.shape)}, but the model "
                        f"makes it {dtype} [{', '.join('any' if d is None else str(d) for d in shape)}]"
                    )
    yield from _constants(manifest)
    taken = _buffer_bytes(manifest)
    if taken > limit:
        yield f"one image's buffers would take {taken} bytes, but with these weights at most {limit} are allocated"
    packed = sum(one.bytes for one in manifest.parameters.values())  # many may lie in one place
    if packed > limit:
        yield f"all parameters would take {packed} bytes, but with these weights at most {limit} are taken"


def _expected(manifest: Manifest) -> dict[str, dict[str, tuple[str, Shape]]]:
    """Graph → port → dtype and shape, as far as the model says them."""
    model, first = manifest.model, manifest.graphs["step"].output("new_k_0")
    C, Z, E, V, L = model.width, model.latent_channels, model.latent_size, model.vocab, manifest.tokens
    image: tuple[str, Shape] = ("uint8", (None, model.image_size, model.image_size, 3))
    f_hat: tuple[str, Shape] = ("float32", (None, Z, E, E))
    rows: tuple[str, Shape] = ("float32", (None, manifest.graphs["condition"].output("modulation").shape[1], C))  # type: ignore[assignment]
    tokens: tuple[str, Shape] = ("float32", (None, None, None, C))
    per_token: Shape = (None, None, None)
    kv: tuple[str, Shape] = (first.dtype, (None, None, *first.shape[2:]))  # type: ignore[arg-type]
    step = {"x": tokens, "next_x": tokens, "modulation": rows, "f_hat": f_hat, "f_hat_out": f_hat}
    step |= {"control": ("float32", (None, None, C)), "uniforms": ("float32", per_token)}
    step |= {"tokens": ("int64", per_token), "known": ("int64", per_token), "known_mask": ("bool", per_token)}
    step |= {"logits": ("float32", (None, None, None, V)), "smooth_noise": ("float32", (None, None, None, V))}
    step |= {name: ("float32", (1,)) for name in ("cfg", "top_p", "cfg_ratio")} | {"smooth": ("bool", (1,))}
    step |= {"top_k": ("int64", (1,)), "pos": ("float32", (None, None, C)), "up": ("float32", (E, None))}
    step |= {"down": ("float32", (None, E))}
    for i in range(model.cache_layers):
        step |= {f"{time}_{kind}_{i}": kv for time in ("past", "new") for kind in ("k", "v")}
    sizes = [scale.control_size for scale in manifest.scales]
    control: dict[str, tuple[str, Shape]] = {f"control_{k}": ("uint8", (n, n, 3)) for k, n in enumerate(sizes)}
    return {
        "control": control | {"features": ("float32", (L, C))},
        "condition": {"label": ("int64", (None,)), "start": ("float32", (None, 1, 1, C)), "modulation": rows},
        "step": step,
        "decoder": {"f_hat": f_hat, "image": image},
        "encoder": {"image": image, "tokens": ("int64", (None, L))},
    }


def _kind(name: str, expected: Mapping[str, object]) -> str:
    """The graph that a static form `NAME.KK.bB` is made from; a branch's graphs have its name in theirs."""
    first, _, rest = name.partition(".")
    own = f"{first}.{rest.partition('.')[0]}"
    return own if own in expected else first


def _expected_of_2(manifest: Manifest) -> dict[str, dict[str, tuple[str, Shape]]]:
    """As `_expected`, of a base and its branches."""
    model, expected = manifest.model, _expected(manifest)
    C, V, L = model.width, model.vocab, manifest.tokens
    item = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[manifest.precision.compute]
    control, step = expected.pop("control"), expected["step"]
    del step["control"]
    step |= {name: ("float32", (None,)) for name in ("cfg", "top_p", "keep", "control_cfg")}
    step |= {name: ("int64", (None,)) for name in ("rows", "twin", "plain", "top_k")} | {"smooth": ("bool", (None,))}
    step |= {"bias": ("float32", (None, None, None, V)), "mix": ("float32", (None, None))}
    kv = step["past_k_0"]
    for name, branch in model.branches.items():
        h = branch.blocks
        rows: tuple[str, Shape] = ("float32", (None, 6 * h, C))
        step["c"] = ("float32", (None, h, None, None, None, C))
        shapes: dict[str, tuple[str, Shape]] = {
            "norm_weight": ("float32", (None, 2 * C)),
            "norm_bias": ("float32", (None, 2 * C)),
            "linear_weight": (item, (None, 2 * C if branch.fusion == "concat" else C, C)),
            "linear_bias": (item, (None, C)),
            "gain": (item, (None, C)),
        }
        step |= {f"fusion_{port}_{i}": shapes[port] for i in range(h) for port in FUSIONS[branch.fusion]}
        own = {
            "x": step["x"],
            "modulation": rows,
            "control": ("float32", (None, None, None, C)),
            "rows": step["rows"],
        }
        own |= {"pos": step["pos"], "c": ("float32", (h, None, None, None, C))}
        own |= {f"{time}_{k}_{i}": kv for time in ("past", "new") for k in "kv" for i in range(branch.cache_layers)}
        expected[f"branch.{name}"] = own
        expected[f"condition.{name}"] = {"label": ("int64", (None,)), "modulation": rows}
        expected[f"control.{name}"] = control | {"features": ("float32", (L, C))}
    return expected


def _fits(port: Port, dtype: str, shape: Shape) -> bool:
    return (
        port.dtype == dtype
        and len(port.shape) == len(shape)
        and all(want is None or want == have for want, have in zip(shape, port.shape, strict=True))
    )


def _constants(manifest: Manifest) -> Iterator[str]:
    """Each scale's constants are of the dtype and shape of the step's inputs."""
    ports = {port.name: port for port in manifest.graphs["step"].inputs}
    for k, scale in enumerate(manifest.scales):
        named: dict[int | str, int] = {"S": scale.side, "T": scale.next_side}
        for name, tensor_name in scale.constants.items():
            tensor, port = manifest.tensors[tensor_name], ports.get(name)
            if port is None:
                yield f"scales[{k}].constants has {name!r}, which is no input of the step"
                continue
            shape = tuple(named.get(dim, dim) for dim in port.shape)
            if (tensor.dtype, tensor.shape) != (port.dtype, shape):
                yield f"tensors[{tensor_name!r}] is {tensor.dtype} {list(tensor.shape)}, but {name} is {list(shape)}"


def _buffer_bytes(manifest: Manifest) -> int:
    """What is allocated for one image with guidance and all branches, but for what is small."""
    model, L = manifest.model, manifest.tokens
    C, V, largest = model.width, model.vocab, max(scale.tokens for scale in manifest.scales)
    item = 4 if manifest.precision.compute == "fp32" else 2
    branches = model.branches.values()
    cache = 2 * (model.cache_layers + sum(one.cache_layers for one in branches)) * L * 2 * C * item
    modulation = manifest.graphs["condition"].output("modulation").shape[1]
    rows = 2 * 4 * C * (L + (modulation if isinstance(modulation, int) else 0)) * 2
    images = 3 * (model.image_size**2 + sum(scale.control_size**2 for scale in manifest.scales))
    latent = 3 * 4 * model.latent_channels * model.latent_size**2
    of_vocab = 4 * V * (L + (largest if manifest.more_smooth else 0))
    named = {name for scale in manifest.scales for name in scale.constants.values()}
    constants = sum(manifest.tensors[name].bytes for name in named)
    ports = [port.shape[1:] for port in manifest.graphs["step"].inputs if port.name.startswith("fusion_")]
    fusions = 4 * sum(math.prod(size for size in shape if isinstance(size, int)) for shape in ports)
    steering = sum(fusions + 4 * C * (L + one.blocks * (2 * largest + 12)) for one in branches)
    return cache + rows + images + latent + of_vocab + constants + steering
