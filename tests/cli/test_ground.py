"""`diffctrl ground`: files and their recipe; bad input in one sentence, before weights are loaded."""

import json
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffctrl.grounding import plan as planning
from diffctrl.zoo import clips, worlds
from diffctrl.zoo.worlds.referring_set import referring_set

WITHOUT_SPACY = pytest.mark.skipif(find_spec("spacy") is not None, reason="spaCy is installed")
PHRASE = "the red star left of a blue ring"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo.jpg"
    values = np.random.default_rng(0).integers(0, 255, (45, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def ground(run, tiny_model, tmp_path):
    """`diffctrl ground` with the tiny model, into an empty folder."""

    def ground(*arguments, model=tiny_model, out=tmp_path / "out"):
        return run("ground", *arguments, "--model", model, "--out", out)

    return ground


def test_writes_overlay_mask_and_recipe(ground, run, photo, tmp_path):
    done = ground(photo, PHRASE)
    assert done.exit_code == 0, done.stderr
    overlay, mask, record = done.stdout.split("\n")[:3]
    assert overlay.startswith(str(tmp_path / "out" / "my-photo-"))
    found = json.loads(Path(record).read_text(encoding="utf-8"))
    assert np.asarray(Image.open(mask)).shape == (45, 70)
    assert (np.asarray(Image.open(mask)) > 0).sum() == found["mask_pixels"]
    x, y = found["point"]
    assert np.asarray(Image.open(mask))[int(y), int(x)] == 255
    assert Image.open(overlay).width >= 256
    assert found["size"] == [45, 70]
    assert found["model_size"] == [24, 40]
    assert "resized to 40 x 24" in done.stderr
    assert [t["word"] for t in found["tokens"] if t["kept"]] == ["red", "star"]
    recipe = found["recipe"]
    assert recipe["picture"]["name"] == "my photo.jpg"
    assert len(recipe["picture"]["sha256"]) == len(recipe["weights"]["sha256"]) == 64
    assert found["settings"]["sigma"] == 0.5
    shown = run("info", record).stdout
    assert "name=my photo.jpg" in shown
    assert recipe["device"] in shown
    assert PHRASE.replace(" ", "-") not in overlay  # nothing of the words is in a file name
    again = ground(photo, PHRASE)
    assert again.stdout == done.stdout
    assert json.loads(Path(record).read_text(encoding="utf-8"))["point"] == [x, y]


def test_a_picture_whose_name_is_no_utf8(ground, photo):
    other = photo.with_name("caf\udce9.jpg")
    photo.rename(other)
    done = ground(other, PHRASE)
    assert done.exit_code == 0, done.stderr
    record = Path(done.stdout.split("\n")[2])
    assert json.loads(record.read_text(encoding="utf-8"))["recipe"]["picture"]["name"] == "caf?.jpg"


def test_many_expressions_and_settings(ground, photo, tmp_path):
    phrases = tmp_path / "phrases.txt"
    lines = "# things\nthe red star\n\nthe  blue ring\nthe red star\n"
    phrases.write_text(lines, encoding="utf-8-sig")  # with the mark that some editors put before it
    done = ground(
        photo, "a cross", "--phrases", phrases, "--set", "mask=mean", "--set", "sigma=0.3", "--size", "32x32"
    )
    assert done.exit_code == 0, done.stderr
    paths = done.stdout.split()
    assert len(paths) == 9
    records = [json.loads(Path(p).read_text(encoding="utf-8")) for p in paths if p.endswith(".json")]
    assert [r["expression"] for r in records] == ["a cross", "the red star", "the blue ring"]
    assert {r["settings"]["mask"] for r in records} == {"mean"}
    assert records[0]["model_size"] == [32, 32]


def test_photographs_are_turned_as_their_camera_says(ground, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (70, 45), (200, 30, 30)).save(tmp_path / "turned.jpg", exif=exif)
    done = ground(tmp_path / "turned.jpg", "the red star")
    assert done.exit_code == 0, done.stderr
    assert "of 45 x 70" in done.stderr


def test_grey_of_16_bits(ground, no_weights, tmp_path):
    grey = np.array([[0, 128], [200, 255]], dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    (frame,) = planning._frames(tmp_path / "deep.png", None)[0]
    assert np.array_equal(np.asarray(frame)[..., 1], grey)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    _refused(ground(tmp_path / "float.tif", "a star"), "does not say which of its values is white")


def test_a_photograph_with_its_gain_map_is_one_picture(ground, tmp_path):
    first, second = (Image.new("RGB", size, (200, 30, 30)) for size in ((70, 45), (35, 20)))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    done = ground(tmp_path / "phone.jpg", "the red star")
    assert done.exit_code == 0, done.stderr
    assert "of 70 x 45" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no expression"),
        ((" ",), "no expression"),
        (("a \udcff star",), "the expression 'a \\udcff star' is not UTF-8"),
        (("a star", "--phrases", "missing.txt"), "cannot be read"),
        (("a star", "--set", "sigmas=1"), "did you mean sigma?"),
        (("a star", "--set", "sigma=1"), "between 0"),
        (("a star", "--set", "sigma"), "not NAME=VALUE"),
        (("a star", "--set", "mask=sam"), "go together"),
        (("a star", "--set", "blocks=7"), "block 7 does not exist"),
        (("a star", "--set", "direction=both"), "i2t, t2i"),
        (("a star", "--size", "big"), "HEIGHTxWIDTH"),
        (("a star", "--size", "30x32"), "the nearest is 32"),
        (("a star", "--size", "32x128"), "up to 64"),
        (("a star", "--set", "mask=sam", "--set", "sam=no/such"), "no folder"),
        (("a star", "--frames", "0"), "starts at 1"),
        pytest.param(
            ("a star", "--set", "noun_phrase=spacy"), "needs spaCy and its model", marks=WITHOUT_SPACY
        ),
        (("a star", "--frames", "3"), "--frames 3 is a length of videos"),
        (("a star", "--device", "tpu9"), "no device"),
        (("a red star " * 30,), "too long"),
    ],
)
def test_one_sentence_and_exit_code_2(ground, no_weights, photo, arguments, says):
    _refused(ground(photo, *arguments), says)


def test_pictures_a_pixel_thin(ground, tmp_path):
    for width, height in ((3000, 1), (1, 3000), (1, 1)):
        Image.new("RGB", (width, height), "red").save(tmp_path / "thin.png")
        done = ground(tmp_path / "thin.png", PHRASE)
        assert done.exit_code == 0, done.stderr
        assert np.asarray(Image.open(done.stdout.split("\n")[1])).shape == (height, width)


@pytest.mark.parametrize(
    ("model", "says"), [("shapes-sd", "did you mean shapes-sd3?"), ("a b", "no hub repository")]
)
def test_models_that_are_not_there(ground, no_weights, photo, model, says):
    _refused(ground(photo, "a star", model=model), says)


def test_pictures_that_cannot_be_read(ground, no_weights, tmp_path, photo):
    _refused(ground(tmp_path / "no.png", "a star"), "no picture")
    (tmp_path / "text.png").write_text("no picture")
    _refused(ground(tmp_path / "text.png", "a star"), "no picture that can be read")
    (tmp_path / "empty").mkdir()
    _refused(ground(tmp_path / "empty", "a star"), "holds no picture")
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(frames / f"{index}.png")
    _refused(ground(frames, "a star"), "reads single pictures")
    Image.new("RGB", (16, 16)).save(frames / "2.png")
    _refused(ground(frames, "a star"), "different sizes")


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1, 11):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "._frame3.png").write_bytes(b"what a Mac writes beside a file")
    frames = planning._frames(tmp_path, None)[0]
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [1, 2, 10, 11]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip of two shapes that one can tell apart, as a file, and the masks of the red one."""
    scenes = clips.sample(40, seed=3, frames=17, split="test", forms=("pair",))
    at = next(
        i for i, facts in enumerate(clips.truth(scenes))
        if [each.colour for each in facts.objects].count("red") == 1
    )  # fmt: skip
    colours = [each.colour for each in clips.truth(scenes)[at].objects]
    video, masks = clips.render(scenes.select([at]), 64)
    path = tmp_path_factory.mktemp("clips") / "two shapes.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in (video[0].permute(0, 2, 3, 1) * 255).round().byte().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path, masks[0, :, colours.index("red")] > 0.5


def test_videos_are_read_by_video_models_alone(ground, no_weights, clip, tmp_path):
    _refused(ground(clip[0], "a star"), "has 17 frames, and")
    (tmp_path / "no.mp4").write_text("no video")
    _refused(ground(tmp_path / "no.mp4", "a star"), "not a video file that can be read")
    assert len(planning._frames(clip[0], 5)[0]) == 5


def test_words_of_clips_are_known_to_the_model_of_clips_alone(clip, tmp_path):
    def warnings(phrase, model, path):
        request = planning.GroundRequest(image=path, phrases=(phrase,), model=model)
        return " ".join(planning.make(request).warnings)

    assert "never saw" not in warnings("the one that moves left quickly", "shapes-wan", clip[0])
    assert "never saw 'dragon'" in warnings("the dragon that moves left", "shapes-wan", clip[0])
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    assert "'moves'" in warnings("the one that moves left", "shapes-sd3", tmp_path / "one.png")


def test_a_long_video_says_how_much_of_it_can_be_read(ground, no_weights, clip, monkeypatch):
    monkeypatch.setattr(planning, "_MOST_PIXELS", 9 * 64 * 64)
    _refused(ground(clip[0], "a star"), "--frames 9 or less")
    assert len(planning._frames(clip[0], 9)[0]) == 9


def test_the_embedded_video_model_follows_an_object(run, clip, tmp_path):
    said = "the red cross"
    done = run("ground", clip[0], said, "--model", "shapes-wan", "--frames", "17", "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "never saw" not in done.stderr
    assert "frames" not in done.stderr  # all of them were read
    record = next(Path(line) for line in done.stdout.split("\n") if line.endswith(".json"))
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["model_size"] == [64, 64]
    track = [np.asarray(Image.open(path)) > 0 for path in sorted(tmp_path.glob("*-track/*.png"))]
    assert len(track) == 17
    part = run("ground", clip[0], said, "--model", "shapes-wan", "--out", tmp_path / "part")
    assert "the first 13 of 17 frames" in part.stderr
    part = run("ground", clip[0], said, "--model", "shapes-wan", "--frames", "9", "--out", tmp_path / "nine")
    assert "the first 9 of 17 frames" in part.stderr
    record = next(Path(line) for line in part.stdout.split("\n") if line.endswith(".json"))
    assert json.loads(record.read_text(encoding="utf-8"))["recipe"]["picture"]["frames"] == 17
    inside = [bool((mask & truth.numpy()).any()) for mask, truth in zip(track, clip[1], strict=True)]
    assert sum(inside) >= 13


def test_pipelines_that_do_not_ground(ground, no_weights, tiny_model, photo, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads((tiny_model / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    _refused(ground(photo, "a star", model=folder), "reads pictures with StableDiffusion3Pipeline")
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["my_code", "Autoencoder"]}))
    _refused(ground(photo, "a star", model=folder), "comes from 'my_code'")


def test_files_that_cannot_be_written(ground, photo, tmp_path):
    mask = Path(ground(photo, PHRASE).stdout.split("\n")[1])
    mask.unlink()
    mask.mkdir()
    done = ground(photo, PHRASE)
    assert done.exit_code == 2
    assert f"{tmp_path / 'out'} cannot be written (Is a directory)" in done.stderr


def test_out_that_is_a_file(ground, photo, tmp_path):
    (tmp_path / "taken").write_text("")
    _refused(ground(photo, "a star", out=tmp_path / "taken"), "cannot be a folder")


def test_generate_says_where_grounding_is(generate, no_weights):
    done = generate("a red star", "--method", "refam")
    assert done.exit_code == 2
    assert "diffctrl ground" in done.stderr


def test_the_embedded_model_finds_shapes(run, tmp_path):
    made = referring_set("colour", 4, seed=9)
    pictures, masks = worlds.render(made.scenes, 128)
    hits = 0
    for index, item in enumerate(made.items):
        path = tmp_path / f"{index}.png"
        Image.fromarray((pictures[index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
        done = run("ground", path, item.expression, "--out", tmp_path / "out")
        assert done.exit_code == 0, done.stderr
        assert "seen as it is" in done.stderr
        record = next(line for line in done.stdout.split() if line.endswith(".json"))
        x, y = json.loads(Path(record).read_text(encoding="utf-8"))["point"]
        hits += bool(masks[index, item.target][int(y), int(x)] > 0.5)
    assert hits >= 3  # colours are what the model knows best; chance is well below one


def _refused(done, says):
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("diffctrl: ")
    assert done.stdout == ""
