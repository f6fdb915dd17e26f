"""Editing on the shipped plan: what is kept is kept, to the token and to the byte; receipts say what they may."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from car_runtime import GenerationConfig, ImageError, RequestError, open_plan
from car_runtime import receipt as receipts
from car_runtime.cli.main import main
from car_runtime.editing.edit import Edit, prepare
from car_runtime.editing.frame import Frame, Square, softened, square_around
from car_runtime.format.manifest import read_manifest
from car_runtime.images import text_chunks
from car_runtime.photo import control_of_photo
from car_runtime.plan import Plan, default_plan
from car_runtime.request import resolve

CONTROL = Path(__file__).parents[2] / "examples" / "umbrella.png"
LABEL = "fluent-objects"


@pytest.fixture(scope="module")
def plan() -> Iterator[Plan]:
    with open_plan(None, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that the command wrote, with its receipt."""
    path = tmp_path_factory.mktemp("drawn") / "a.png"
    assert main(["--control", str(CONTROL), "--class", LABEL, "--seed", "5", "-o", str(path)]) == 0
    return path


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise, in which any pixel that changes is seen."""
    shape = (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, shape, np.uint8))


def marked(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# -- the frame ------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 12))
def test_a_seam_is_one_on_the_mask_and_nothing_beyond_its_width(x: int, y: int, width: int) -> None:
    mask = marked(48, 44, (x, y, x + 5, y + 3))
    alpha = softened(mask, width)
    rows, columns = np.indices(mask.shape)
    ys, xs = np.nonzero(mask)
    away = np.maximum(  # in the larger of both directions
        np.maximum(ys.min() - rows, rows - ys.max()), np.maximum(xs.min() - columns, columns - xs.max())
    )
    assert (alpha[mask] == 1).all()
    assert (alpha[away > width] == 0).all()
    assert ((alpha >= 0) & (alpha <= 1)).all()


@given(st.integers(20, 90), st.integers(20, 90), st.data())
def test_the_square_covers_what_is_drawn_and_stays_in_the_frame_where_it_fits(
    width: int, height: int, data: st.DataObject
) -> None:
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x, y, data.draw(st.integers(x + 1, width)), data.draw(st.integers(y + 1, height)))
    square = square_around(marked(width, height, box), 16)
    assert square.left <= box[0]
    assert box[2] <= square.left + square.side
    assert square.top <= box[1]
    assert box[3] <= square.top + square.side
    if square.side <= min(width, height):
        assert 0 <= square.left <= width - square.side
        assert 0 <= square.top <= height - square.side


@pytest.mark.parametrize("size", [(1000, 1000), (1000, 1001)])
def test_the_square_of_a_small_part_of_a_large_photo_is_around_it(size: tuple[int, int]) -> None:
    assert square_around(marked(*size, (500, 500, 600, 580)), 64).side == 400
    assert square_around(marked(*size, (500, 500, 503, 503)), 64).side == 64


def test_a_part_whose_square_would_take_terabytes_is_refused() -> None:
    assert square_around(np.ones((8, 8192), np.bool_), 64).side == 8192
    with pytest.raises(RequestError, match=r"drawn anew is 2000000 pixels long, over 8192; mark less, or make"):
        square_around(np.ones((8, 2_000_000), np.bool_), 64)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("feather", [0, 3, None])
def test_beyond_the_seam_every_byte_is_the_photos(mode: str, feather: int | None) -> None:
    image, mask = photo(200, 90, mode), marked(200, 90, (120, 30, 150, 60))
    square = square_around(mask, 64)
    pasted = Frame(image=image, repaint=mask, square=square).paste(np.full((64, 64, 3), 7, np.uint8), feather)
    width = round(0.02 * square.side) if feather is None else feather
    changed = (pasted != np.asarray(image)).any(-1)
    ys, xs = np.nonzero(changed)
    assert pasted.shape == (90, 200, len(mode))
    assert (pasted[mask][:, :3] == 7).all()
    assert 120 - width <= xs.min()
    assert xs.max() < 150 + width
    assert 30 - width <= ys.min()
    assert ys.max() < 60 + width


def test_a_seam_over_transparency_has_no_other_colour_than_what_is_drawn() -> None:
    """Transparent pixels are black ones mostly; mixed in, they would draw a grey line along the seam."""
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    frame = Frame(image=clear, repaint=marked(64, 64, (0, 0, 32, 64)), square=Square(left=0, top=0, side=64))
    pasted = frame.paste(np.full((64, 64, 3), 240, np.uint8), 6)
    seen = pasted[..., 3] > 0
    assert (pasted[seen][:, :3] == 240).all()
    assert len(np.unique(pasted[..., 3])) > 3, "the cover itself fades"
    half = Image.new("RGBA", (64, 64), (100, 100, 100, 255))
    opaque = Frame(image=half, repaint=frame.repaint, square=frame.square).paste(
        np.full((64, 64, 3), 240, np.uint8), 6
    )
    assert (opaque[..., 3] == 255).all()
    assert (np.diff(opaque[0, 31:40, 0].astype(int)) <= 0).all()


def test_a_seam_does_not_depend_on_how_much_of_the_photo_it_is_made_of() -> None:
    image, mask = photo(120, 100), marked(120, 100, (60, 30, 90, 60))
    mask[20:25, 95] = True
    white, square = np.full((40, 40, 3), 255, np.uint8), Square(left=58, top=22, side=40)
    pasted = Frame(image=image, repaint=mask, square=square).paste(white, 9)
    alpha = softened(mask, 9)[22:62, 58:98, None]
    kept = np.asarray(image)[22:62, 58:98]
    assert (pasted[22:62, 58:98] == np.rint(alpha * 255 + (1 - alpha) * kept)).all()


def test_a_square_beyond_the_frame_goes_on_with_its_edge() -> None:
    image = photo(30, 80)
    frame = Frame(image=image, repaint=marked(30, 80, (0, 5, 30, 75)), square=Square(left=-20, top=5, side=70))
    seen = np.asarray(frame.view(70))
    assert (seen[:, :20] == seen[:, 20:21]).all()
    assert frame.repaint_view().all()
    assert frame.paste(np.zeros((70, 70, 3), np.uint8), 0).shape == (80, 30, 3)


def plain_frame(level: int, anew: tuple[int, int, int, int]) -> Frame:
    """A photo of one grey level, 64×64, of which a box is drawn anew."""
    image = Image.fromarray(np.full((64, 64, 3), level, np.uint8))
    return Frame(image=image, repaint=marked(64, 64, anew), square=Square(left=0, top=0, side=64))


def test_the_map_of_an_edited_photo_is_of_the_square_that_is_seen() -> None:
    """Neither of the middle of a photo that isn't square, nor at the resolution of all of it."""
    manifest = read_manifest(default_plan())
    pixels = np.full((128, 512, 3), 255, np.uint8)
    pixels[:, 48:56] = 0
    wide = Image.fromarray(pixels)
    edit = Edit(image=wide, box=(16, 0, 96, 128))
    made, _ = control_of_photo(wide, manifest, edit=edit)
    control = resolve(manifest, GenerationConfig(control=made, edit=edit)).control
    assert control is not None
    left = prepare(manifest, edit).frame.square.left
    wanted, _ = control_of_photo(wide.crop((left, 0, left + 128, 128)), manifest)
    assert wanted.max() == 255
    assert np.array_equal(np.asarray(control), wanted)


def test_the_map_of_an_extended_photo_has_no_line_where_it_ends() -> None:
    manifest = read_manifest(default_plan())
    pixels = np.full((128, 128, 3), 40, np.uint8)
    pixels[40:90, 40:90] = 220
    grey = Image.fromarray(pixels)
    edit = Edit(image=grey, extend=(0, 0, 64, 0))
    made, _ = control_of_photo(grey, manifest, edit=edit)
    assert made.shape == (128, 192, 3)
    lines = made[..., 0].max(0)
    assert lines[30:100].max() == 255
    assert not lines[110:].any()


def test_a_control_of_the_photo_alone_is_put_where_the_photo_is_in_an_extended_frame() -> None:
    manifest, edges = read_manifest(default_plan()), Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    frame = prepare(manifest, Edit(image=photo(128, 128), extend=(0, 0, 64, 0))).frame
    assert (frame.square.left, frame.square.side) == (64, 128)
    cut = np.asarray(frame.cut_alike(edges, (9, 9, 9)))
    assert (cut[:, :64] == 255).all()
    assert (cut[:, 64:] == 9).all()
    assert (np.asarray(frame.cut_alike(edges.resize((96, 64)))) == 255).all(), "of the frame's shape, it covers it"


def test_the_tokenizers_error_around_what_is_drawn_is_taken_off_it() -> None:
    frame = plain_frame(180, (20, 20, 44, 44))
    drawn = np.full((64, 64, 3), 180, np.uint8)
    drawn[28:36, 28:36] = (90, 20, 250)  # an object within
    assert (frame.matched(drawn) == drawn).all(), "nothing is wrong, nothing changes"
    off = np.asarray([12, -9, 15])
    found = frame.matched((drawn.astype(int) - off).clip(0, 255).astype(np.uint8)).astype(int)
    assert np.abs(found - drawn)[20:44, 20:44].max() <= 6  # one level, and what was clipped of the object
    assert np.abs(found - drawn)[20:28, 20:44].max() <= 1


def test_a_step_between_plain_areas_fades_into_what_is_drawn() -> None:
    frame, drawn = plain_frame(200, (32, 0, 64, 64)), np.full((64, 64, 3), 200, np.uint8)
    drawn[:, 32:] = 150
    row = frame.matched(drawn)[32, :, 0].astype(int)
    assert np.abs(row[:34] - 200).max() <= 4
    assert (np.diff(row[32:]) <= 0).all()
    assert row[63] <= 155
    drawn[:, 30:32] = 160  # its colour runs over the border
    assert np.abs(frame.matched(drawn)[32, :34, 0].astype(int) - 200).max() <= 20
    rough = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    rough[:, :32] = np.asarray(frame.image)[:, :32]
    assert np.abs(frame.matched(rough).astype(int) - rough).mean() < 4, "no step is seen next to texture"


def test_a_shape_that_ends_at_the_border_leaves_its_colour_outside() -> None:
    """What differs from most of the border is something else, such as a tail, and not a step."""
    image = np.full((64, 64, 3), 200, np.uint8)
    image[24:40, :32] = (220, 60, 90)
    frame = Frame(
        image=Image.fromarray(image), repaint=marked(64, 64, (32, 0, 64, 64)), square=Square(left=0, top=0, side=64)
    )
    drawn = image.copy()
    drawn[:, 32:] = 200
    found = frame.matched(drawn).astype(int)
    assert np.abs(found - 200)[:, 32:].max() <= 12
    assert np.abs(np.diff(found[:, 34:], axis=0)).max() <= 2, "no border of its own"


def test_tones_are_left_alone_where_nothing_is_kept_or_it_is_asked_for() -> None:
    everything = Frame(
        image=photo(64, 64), repaint=np.ones((64, 64), np.bool_), square=Square(left=0, top=0, side=64)
    )
    drawn = np.asarray(photo(64, 64)) // 2
    assert (everything.matched(drawn) == drawn).all()
    manifest = read_manifest(default_plan())
    for match in (True, False):
        edit = prepare(manifest, Edit(image=plain_frame(200, (0, 0, 1, 1)).image, box=(0, 0, 32, 64), match=match))
        plain = edit.frame.paste(drawn)
        assert (edit.finished(drawn) == plain).all() == (not match)


# -- tokens ---------------------------------------------------------------------


def test_an_edit_is_known_tokens_of_the_encoded_image(plan: Plan) -> None:
    """The same as the sketch that it replaces; that one is held to PyTorch elsewhere."""
    size = plan.manifest.model.image_size
    image, mask = photo(size, size), marked(size, size, (0, 0, 80, 48))
    edit = Edit(image=image, mask=Image.fromarray(mask))
    made = plan.generate(CONTROL, LABEL, 3, 2, edit=edit)
    known, keep = plan.encode(image)[0], plan.known_mask(mask)
    by_hand = plan.generate(CONTROL, LABEL, 3, 2, known_tokens=known, known_mask=keep)
    assert (made.tokens == by_hand.tokens).all()
    assert (made.tokens[:, keep] == known[keep]).all()
    assert (made.tokens[0] != made.tokens[1]).any()
    assert made.edited is not None
    outside = softened(mask, round(0.02 * size)) == 0
    for edited in made.edited:
        assert (edited[outside] == np.asarray(image)[outside]).all()


@pytest.mark.parametrize("rule", ["published", "strict"])
def test_coarse_scales_are_kept_up_to_the_one_that_is_named(plan: Plan, rule: str) -> None:
    size, scales = plan.manifest.model.image_size, plan.manifest.scales
    image = photo(size, size)
    made = plan.generate(CONTROL, 3, edit=Edit(image=image, from_scale=4, rule=rule))  # type: ignore[arg-type]
    stop = scales[3].stop
    assert (made.tokens[0, :stop] == plan.encode(image)[0, :stop]).all()
    assert made.tokens.shape == (1, plan.manifest.tokens)
    assert made.edited is not None
    assert (made.edited[0] == made.images[0]).all(), "no pixel of it is put back"


def test_everything_kept_is_the_encoded_image_again(plan: Plan) -> None:
    size, K = plan.manifest.model.image_size, len(plan.manifest.scales)
    image = photo(size, size)
    tokens = plan.encode(image)[0]
    made = plan.generate(CONTROL, 0, edit=Edit(image=image, from_scale=K))
    assert (made.tokens[0] == tokens).all()
    coarse = plan.generate(CONTROL, 0, edit=Edit(image=image, from_scale=3), stop_after=2)
    assert (coarse.tokens[0, : plan.manifest.scales[2].stop] == tokens[: plan.manifest.scales[2].stop]).all()
    with pytest.raises(RequestError, match="scales 0…2 are drawn, so that none is drawn anew; give less than 3"):
        plan.generate(CONTROL, 0, edit=Edit(image=image, from_scale=4), stop_after=2)


def test_harmonising_takes_the_coarse_scales_of_the_first_result(plan: Plan) -> None:
    size = plan.manifest.model.image_size
    edit = Edit(image=photo(size, size), box=(0, 0, size, size // 2), harmonise=3, feather=0)
    made = plan.generate(CONTROL, 0, edit=edit)
    first = plan.generate(CONTROL, 0, edit=Edit(image=photo(size, size), box=edit.box, feather=0))
    assert first.edited is not None
    stop = plan.manifest.scales[2].stop
    assert (made.tokens[0, :stop] == plan.encode(first.edited[0])[0, :stop]).all()
    assert made.request.edit is not None
    assert made.request.edit.facts()["edit_harmonise"] == 3


def test_an_extended_frame_keeps_the_photo(plan: Plan) -> None:
    image = photo(90, 60)
    made = plan.generate(CONTROL, 0, edit=Edit(image=image, extend=(10, 0, 30, 5), feather=0))
    assert made.edited is not None
    assert made.edited[0].shape == (65, 130, 3)
    assert (made.edited[0][:60, 10:100] == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"box": (0, 0, 65, 3)}, "not inside the image of 64×64"),
        ({"box": (5, 5, 5, 9)}, "not inside"),
        ({"extend": (0, 0, 0, 0)}, "extended by 0"),
        ({"extend": (65, 0, 0, 0)}, "at most 100%"),
        ({"from_scale": 8}, "from_scale is 8, but must be a whole number in 0…7"),
        ({"harmonise": -1, "box": (0, 0, 9, 9)}, "harmonise is -1"),
        ({"rule": "loose"}, "no mask rule 'loose'"),
        ({"feather": -1.0}, "feather is -1.0"),
        ({"mask": np.zeros((64, 64), np.uint8)}, "the mask is empty"),
        ({"mask": np.zeros((64, 63), np.uint8)}, "63×64 pixels and the image 64×64"),
        ({"mask": np.zeros((64, 64), np.uint8), "box": (0, 0, 9, 9)}, "give one of mask, box and extend"),
        ({"box": (0, 0, 9)}, "box is (0, 0, 9), but must be four whole numbers"),
        ({"box": "0,0,9,9"}, "box is '0,0,9,9', but must be four"),
        ({"extend": (1.5, 0, 0, 0)}, "extend is (1.5, 0, 0, 0), but must be four"),
        ({"feather": "wide", "box": (0, 0, 9, 9)}, "feather is 'wide'"),
        ({"tokens": np.zeros(5, np.int64)}, "give an array of integers of shape [422]"),
        ({"tokens": np.zeros(422)}, "give an array of integers"),
        ({"tokens": np.full(422, 1024)}, "tokens hold 1024…1024; give -1…1023"),
    ],
)
def test_a_bad_edit_is_refused_with_its_range(edit: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        prepare(read_manifest(default_plan()), Edit(image=photo(64, 64), **edit))  # type: ignore[arg-type]


def test_what_is_no_edit_is_refused(plan: Plan) -> None:
    with pytest.raises(RequestError, match=r"give a car_runtime\.editing\.edit\.Edit"):
        plan.generate(CONTROL, edit={"image": photo(64, 64)})  # type: ignore[call-overload]


def test_an_edit_and_known_tokens_exclude_each_other(plan: Plan) -> None:
    known = np.zeros(plan.manifest.tokens, int)
    with pytest.raises(RequestError, match="give one"):
        plan.generate(CONTROL, edit=Edit(image=photo(64, 64)), known_tokens=known, known_mask=known == 0)


# -- receipts -------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 60), st.randoms(use_true_random=False))
def test_packed_tokens_come_back(vocab: int, L: int, random: object) -> None:
    tokens = np.array([random.randint(-1, vocab - 1) for _ in range(L)], np.int64)  # type: ignore[attr-defined]
    assert (receipts.unpack(receipts.pack(tokens, vocab), L, vocab) == tokens).all()


def test_a_d16s_receipt_is_under_2_kb() -> None:
    tokens = np.random.default_rng(0).integers(0, 4096, 680)
    receipt = receipts.Receipt(plan="0" * 64, name="d16", settings={"seed": 1}, tokens=tokens, control="0" * 64)
    assert len(receipts.text_of(receipt, 4096)) <= 2048


def _with_chunk(path: Path, change: object) -> io.BytesIO:
    """The image with its receipt's text changed."""
    from PIL import PngImagePlugin

    with Image.open(path) as image:
        image.load()
        info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
        info.add_text(receipts.KEY, change(image.text[receipts.KEY]))  # type: ignore[attr-defined, operator]
        image.save(stream, "PNG", pnginfo=info)
    stream.seek(0)
    return stream


def _signed(body: dict[str, object]) -> str:
    """A chunk whose digest fits, as a stranger can make one."""
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"receipt": body, "sha256": hashlib.sha256(plain.encode()).hexdigest()})


def _of_another_plan(text: str) -> str:
    return _signed(json.loads(text)["receipt"] | {"plan": "1" * 64, "name": "other\x1b[2J"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace('"seed":5', '"seed":6'), "altered or is damaged"),
        (lambda text: "[" * 60_000, "altered or is damaged"),
        (lambda text: text + " " * 70_000, "altered or is damaged"),
        (lambda text: "{}", "altered or is damaged"),
        (_of_another_plan, "made by another plan"),
        (lambda text: _signed({"version": 1}), "made by another plan"),
        (lambda text: _signed(json.loads(text)["receipt"] | {"plan": ""}), "made by another plan"),
    ],
)
def test_a_foreign_receipt_is_refused(drawn: Path, change: object, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        receipts.receipt_of(text_chunks(_with_chunk(drawn, change)), read_manifest(default_plan()))
    new = replace(read_manifest(default_plan()), provenance={})  # which was upgraded from none
    with pytest.raises(RequestError, match=said):
        receipts.receipt_of(text_chunks(_with_chunk(drawn, change)), new)


def test_a_receipt_names_no_files_and_asks_for_no_more_images(drawn: Path) -> None:
    def planted(text: str) -> str:
        body = json.loads(text)["receipt"]
        body["settings"] |= {"control": str(CONTROL), "n": 1024, "fit": "pad", "known_tokens": "x", "edit": "whole"}
        return _signed(body)

    receipt = receipts.receipt_of(text_chunks(_with_chunk(drawn, planted)), read_manifest(default_plan()))
    assert receipt is not None
    assert receipt.settings.keys() == {"label", "seed", "cfg", "top_k", "top_p", "edit"}


def test_a_file_without_text_chunks_has_none(tmp_path: Path) -> None:
    photo(20, 20).save(tmp_path / "x.jpg")
    assert text_chunks(tmp_path / "x.jpg") == {}
    with pytest.raises(ImageError, match="no image"):
        text_chunks(tmp_path / "gone.png")


def test_again_draws_the_same_file(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = drawn.with_name("same.png")
    assert main(["again", str(drawn), "-o", str(same)]) == 0
    assert same.read_bytes() == drawn.read_bytes()
    assert "agrees: 422 of 422 tokens" in capsys.readouterr().err


def test_again_with_a_flag_is_the_same_but_for_it(drawn: Path) -> None:
    other, direct = drawn.with_name("other.png"), drawn.with_name("direct.png")
    assert main(["again", str(drawn), "--seed", "9", "-o", str(other)]) == 0
    assert main(["--control", str(CONTROL), "--class", LABEL, "--seed", "9", "-o", str(direct)]) == 0
    assert other.read_bytes() == direct.read_bytes()


def test_variations_share_the_composition(plan: Plan, drawn: Path) -> None:
    """Those of a receipt: the tokens are the image's own, where encoding it would give others."""
    grid = drawn.with_name("v.png")
    tokens = drawn.with_name("v.npz")
    args = ["vary", str(drawn), "--from-scale", "3", "-n", "2", "--seed", "7"]
    assert main([*args, "-o", str(grid), "--tokens", str(tokens)]) == 0
    first = plan.generate(CONTROL, LABEL, 5).tokens[0]
    varied, stop = np.load(tokens)["tokens"], plan.manifest.scales[2].stop
    assert (varied[:, :stop] == first[:stop]).all()
    assert (varied[0] != varied[1]).any()


def test_no_receipt_leaves_it_out(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = drawn.with_name("bare.png")
    assert main(["again", str(drawn), "-o", str(bare), "--no-receipt"]) == 0
    with Image.open(bare) as image:
        assert receipts.KEY not in image.text  # type: ignore[attr-defined]
        assert receipts.CONTROL_KEY not in image.text  # type: ignore[attr-defined]
    assert main(["again", str(bare), "-o", str(bare.with_name("x.png"))]) == 2
    assert "has no receipt" in capsys.readouterr().err


def test_a_receipt_stands_for_its_own_pixels_alone(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that changes an image and keeps its text chunks, as ImageMagick does."""
    from PIL import PngImagePlugin

    changed, fresh, varied = (drawn.with_name(f"{name}.png") for name in ("changed", "fresh", "varied"))
    info = PngImagePlugin.PngInfo()
    with Image.open(drawn) as image:
        for key, text in image.text.items():  # type: ignore[attr-defined]
            info.add_text(key, text)
        image.paste((255, 0, 0), (0, 0, 64, 30))
        image.save(changed, pnginfo=info)
        image.save(fresh)
    given = ["--control", str(CONTROL), "--class", LABEL, "--from-scale", "4", "--no-receipt", "-o", str(varied)]
    for command in ("vary", "restyle"):
        assert main([command, str(changed), *given]) == 0
        assert "the image was changed after it was drawn" in capsys.readouterr().err
        found = varied.read_bytes()
        assert main([command, str(fresh), *given]) == 0
        assert varied.read_bytes() == found
        assert main([command, str(drawn), *given]) == 0
        assert "was changed" not in capsys.readouterr().err
        assert varied.read_bytes() != found
    assert main(["again", str(changed), "-o", str(varied)]) == 0
    assert "the image was changed after it was drawn" in capsys.readouterr().err
    assert varied.read_bytes() == drawn.read_bytes()


def test_scales_that_the_receipt_has_not_are_not_kept(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coarse, varied = drawn.with_name("coarse.png"), drawn.with_name("varied.png")
    assert main(["again", str(drawn), "--stop-after", "2", "-o", str(coarse)]) == 0
    assert main(["vary", str(coarse), "--from-scale", "3", "-o", str(varied)]) == 0
    capsys.readouterr()
    assert main(["vary", str(coarse), "--from-scale", "4", "-o", str(varied)]) == 2
    assert "has 3 scales, as it was drawn; give 0…3" in capsys.readouterr().err


def test_a_preset_replaces_what_the_receipt_has(drawn: Path) -> None:
    other, direct = drawn.with_name("other.png"), drawn.with_name("direct.png")
    assert main(["again", str(drawn), "--preset", "car", "--top-k", "9", "-o", str(other)]) == 0
    flags = ["--seed", "5", "--preset", "car", "--top-k", "9"]
    assert main(["--control", str(CONTROL), "--class", LABEL, *flags, "-o", str(direct)]) == 0
    assert other.read_bytes() == direct.read_bytes()


def test_a_control_that_is_not_the_receipts_is_left_out_with_a_line(
    drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import PngImagePlugin

    info, other = PngImagePlugin.PngInfo(), drawn.with_name("other.png")
    with Image.open(drawn) as image:
        info.add_text(receipts.KEY, image.text[receipts.KEY])  # type: ignore[attr-defined]
        image.save(other, pnginfo=info)
    assert main(["vary", str(other), "--from-scale", "4", "-o", str(drawn.with_name("v.png"))]) == 0
    assert "encloses no control image, or another" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["saved.jpg", "saved.png", "saved.webp"])
def test_an_image_that_was_saved_anew_has_no_receipt(
    name: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`again` says so; `vary` encodes it instead."""
    monkeypatch.chdir(tmp_path)
    with Image.open(drawn) as image:
        image.save(name)
    assert main(["again", name, "-o", "x.png"]) == 2
    error = capsys.readouterr().err
    assert f"'{name}' has no receipt; only PNG files that car-run wrote have one" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert main(["vary", name, "--control", str(CONTROL), "--from-scale", "3", "-o", "x.png"]) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["paint", "PHOTO", "--box", "1,2,3"], "give four numbers"),
        (["paint", "PHOTO"], "one of the arguments --mask --box is required"),
        (["extend", "PHOTO", "--left", "half"], "give pixels, 64, or a share, 25%"),
        (["extend", "PHOTO", "--control", str(CONTROL)], "extended by 0"),
        (["extend", "PHOTO", "--left", "120%", "--control", str(CONTROL)], "at most 100%"),
        (["restyle", "PHOTO"], "add --class"),
        (["vary", "PHOTO", "--control", str(CONTROL), "--from-scale", "99"], "from_scale is 99"),
        (["vary", "PHOTO", "--control", str(CONTROL), "--from-scale", "7"], "keeps all 7 scales; give 0…6"),
        (["restyle", "PHOTO", "--class", "4", "--from-scale", "7"], "keeps all 7 scales; give 0…6"),
        (["vary", "PHOTO", "--from-scale", "3", "--stop-after", "2"], "all 3 scales up to --stop-after; give 0…2"),
        (["paint", "PHOTO", "--box", "6,6,11,11"], "covers no token by half, which are 8 pixels wide"),
        (["paint", "PHOTO", "--box", "0,0,128,128", "--stop-after", "0"], "would be kept; give a larger part"),
        (["extend", "PHOTO", "--left", "1"], "covers no token by half"),
        (["paint", "PHOTO", "--box", "-1,0,9,9"], "not inside the image of 128×128"),
        (["paint", "PHOTO", "--box", "0,0,9,9", "--control", str(CONTROL), "-o", "PHOTO"], "would replace the input"),
        (["again", "PHOTO"], "has no receipt"),
        (["again", "gone.png"], "there is no image"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo(128, 128).save("photo.png")
    assert main([arg.replace("PHOTO", "photo.png") for arg in args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(("space", "kept"), [(b"RGB ", True), (b"GRAY", False)])
def test_an_edited_photo_keeps_its_colour_profile(space: bytes, kept: bool, tmp_path: Path) -> None:
    """Else its pixels, though the same bytes, would show as other colours."""
    profile = bytes(16) + space + bytes(108)
    photo(64, 64).save(tmp_path / "photo.png", icc_profile=profile)
    args = ["paint", str(tmp_path / "photo.png"), "--box", "8,8,40,40", "-o", str(tmp_path / "x.png")]
    assert main(args) == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.info.get("icc_profile") == (profile if kept else None)


def test_a_sheet_shows_what_is_edited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    image.save(tmp_path / "photo.png")
    args = [
        "paint",
        str(tmp_path / "photo.png"),
        "--box",
        "40,40,90,90",
        "--control",
        str(CONTROL),
        "-n",
        "2",
        "--grid",
    ]
    assert main([*args, "-o", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out-grid.png") as out:
        sheet = np.asarray(out)
    assert sheet.shape == (128, 3 * 132 - 4, 3)
    assert (sheet[40:90, 40:90] == 128).all(), "the hole"
    assert (sheet[:30] == 255).all(), "transparent is white"


def test_painting_a_part_keeps_a_large_photo(tmp_path: Path) -> None:
    image = photo(150, 100)
    image.save(tmp_path / "photo.png")
    args = ["paint", str(tmp_path / "photo.png"), "--box", "60,20,90,50", "--control", str(CONTROL)]
    assert main([*args, "--feather", "0", "-o", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as out:
        changed = (np.asarray(out) != np.asarray(image)).any(-1)
    assert out.size == (150, 100)
    assert changed[20:50, 60:90].any()
    changed[20:50, 60:90] = False
    assert not changed.any()
    assert main(["again", str(tmp_path / "out.png"), "-o", str(tmp_path / "x.png")]) == 2, "the photo isn't in it"
