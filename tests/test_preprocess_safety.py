"""preprocess.py: no cache is lost or mixed, and what a file claims is not believed blindly."""

import gzip
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, RLELossless

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TASKS = pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
XRAYS = pytest.mark.parametrize("task", ["classification", "detection"])


def script(task: str):
    return importlib.import_module(f"{task}.preprocess")


def draw_raw(raw: Path, task: str, value: int = 0) -> Path:
    """Four pictures of 40 x 20 pixels, or two volumes: noise, of another seed for another value."""
    rng = np.random.default_rng(value)
    if task == "segmentation":
        for kind in ("imagesTr", "labelsTr"):
            (raw / kind).mkdir(parents=True)
        for k in range(2):
            mask = np.zeros((8, 8, 8), np.uint8)
            mask[2:5, 2:5, 2 : 4 + k] = 1
            for kind, voxels in (
                ("imagesTr", rng.normal(size=mask.shape) + mask),
                ("labelsTr", mask),
            ):
                nib.save(
                    nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)),
                    raw / kind / f"c{k}.nii.gz",
                )
        return raw
    for k in range(4):
        name = f"{'ab'[k % 2]}/{k}.png" if task == "classification" else f"images/{k}.png"
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 40), dtype=np.uint8)).save(raw / name)
    if task == "detection":
        rows = [f"{k}.png,1,1,9,{9 + value % 9}" for k in range(4)]
        (raw / "boxes.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax", *rows]))
    return raw


def run(task: str, raw: Path, out: Path, *options: str) -> None:
    script(task).main(["--data", str(raw), "--out", str(out), "--workers", "1", *options])


def refusal(task: str, raw: Path, out: Path, *options: str) -> str:
    """The one line that a command is refused with; nothing is left of it."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(script(task).DataError) as caught:
        run(task, raw, out, *options)
    assert sorted(os.listdir(out.parent)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- the old cache or the new one ---


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from {task}.preprocess import open_output
with open_output(Path(sys.argv[1]), True) as folder:
    (folder / "meta.json").write_text("of the first")
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
@TASKS
def test_two_runs_do_not_write_one_cache(tmp_path, task):
    raw, out = draw_raw(tmp_path / "raw", task), tmp_path / "out"
    command = [sys.executable, "-c", HOLD.format(task=task), out, ROOT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    assert first.stdout.readline() == "held\n"
    assert "another run writes here" in refusal(task, raw, out, "--overwrite")
    first.communicate("go on\n", timeout=60)
    assert contents(out) == {"meta.json": b"of the first"} and sorted(os.listdir(tmp_path)) == [
        "out",
        "raw",
    ]
    second = subprocess.Popen(command, **pipes)
    assert second.stdout.readline() == "held\n"
    second.kill()
    second.communicate()
    run(task, raw, out, "--overwrite")  # a killed run keeps nobody out, and leaves nothing behind
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"] and (out / "index.csv").is_file()


@TASKS
def test_a_cache_is_there_whenever_its_replacement_is_stopped(tmp_path, task, monkeypatch):
    out = tmp_path / "out"
    run(task, draw_raw(tmp_path / "raw", task), out)
    old = contents(out)
    draw_raw(tmp_path / "new", task, 1)
    real = Path.rename

    def stopped(path: Path, target: Path) -> Path:
        if path.name == ".out.partial":
            os._exit(9)  # as by kill -9, between the two renames
        return real(path, target)

    if os.fork() == 0:
        monkeypatch.setattr(Path, "rename", stopped)
        run(task, tmp_path / "new", out, "--overwrite")
    os.wait()
    assert not out.exists() and contents(tmp_path / ".out.old") == old
    assert "exists already; use --overwrite" in refusal_text(task, tmp_path / "new", out)
    assert contents(out) == old  # the next command has put it back
    run(task, tmp_path / "new", out, "--overwrite")
    assert contents(out) != old and contents(out).keys() == old.keys()
    assert sorted(os.listdir(tmp_path)) == ["new", "out", "raw"]


def refusal_text(task: str, raw: Path, out: Path) -> str:
    with pytest.raises(script(task).DataError) as caught:
        run(task, raw, out)
    return str(caught.value)


@TASKS
def test_a_full_disk_names_the_file_and_leaves_the_old_cache(tmp_path, task, monkeypatch):
    raw, out = draw_raw(tmp_path / "raw", task), tmp_path / "out"
    run(task, raw, out)
    before = contents(out)

    def full(*_: object, **__: object) -> None:
        raise OSError("500 requested and 100 written")  # numpy's own, without a number

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    assert "No space left on device" in refusal(task, raw, out, "--overwrite")
    assert contents(out) == before


def start_long_run(folder: Path) -> subprocess.Popen:
    """A run of 304 images by two processes, as soon as the first images are written."""
    raw = draw_raw(folder / "raw", "classification")
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "big.png")
    for k in range(300):
        os.link(folder / "big.png", raw / "a" / f"big{k}.png")
    command = [sys.executable, ROOT / "classification" / "preprocess.py", "--workers", "2"]
    command += ["--data", raw, "--out", folder / "out"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    images = folder / ".out.partial" / "images.npy"
    while running.poll() is None and not (images.exists() and images.stat().st_size > 1000):
        time.sleep(0.01)
    return running


def test_an_interrupt_is_one_line_and_leaves_nothing(tmp_path):
    running = start_long_run(tmp_path)
    for pid in children(running.pid):  # a terminal interrupts them too: they leave it to the first
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130 and error == "interrupted\n"
    assert sorted(os.listdir(tmp_path)) == ["big.png", "raw"]


def children(pid: int) -> list[int]:
    """The processes that one has started: two of a long run, but on other systems none."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


@pytest.mark.skipif(sys.platform != "linux", reason="threads")
def test_no_process_outlives_the_first(tmp_path):
    running = start_long_run(tmp_path)
    others = children(running.pid)
    assert len(others) == 2
    running.kill()
    running.communicate(timeout=60)
    until = time.monotonic() + 10
    while any(is_alive(pid) for pid in others) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(is_alive(pid) for pid in others)


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended may wait to be asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def square(number: int) -> int:
    return number**2


def end_at_100(number: int) -> int:
    if number == 100:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
    return number


def fail_at_100(number: int) -> int:
    return number // (number - 100)


@XRAYS
def test_processes_give_what_threads_give_in_the_same_order(task):
    for count in (0, 1, 255, 256, 300, 1001):
        items = list(range(count))
        expected = [(number, number**2) for number in items]
        for workers in (1, 2, 3):
            assert list(script(task).in_processes(square, items, workers, 8)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="threads")
@XRAYS
def test_a_process_that_the_system_ends_is_an_error_and_a_bug_keeps_its_traceback(task):
    items = list(range(300))
    with pytest.raises(script(task).DataError, match=r"out of memory.*fewer --workers"):
        list(script(task).in_processes(end_at_100, items, 2, 8))
    with pytest.raises(ZeroDivisionError) as caught:
        list(script(task).in_processes(fail_at_100, items, 2, 8))
    assert "in fail_at_100" in str(caught.value.__cause__)


@TASKS
def test_several_processes_write_the_same_cache_as_one(tmp_path, task):
    raw = draw_raw(tmp_path / "raw", task)
    draw_more(raw, task)
    found = []
    for workers in ("1", "2"):
        run(task, raw, tmp_path / workers, "--skip-bad", "--workers", workers)
        files = contents(tmp_path / workers)
        meta = json.loads(files.pop("meta.json"))
        found.append((files, meta["n"], meta.get("mean"), meta["skipped"]))
    assert found[0] == found[1] and found[0][1] >= 40
    assert found[0][-1] == (2 if task == "segmentation" else 1)


def draw_more(raw: Path, task: str) -> None:
    """40 more volumes, or 300 more pictures; the seventh is none, volume 8 has hardly any contrast."""
    if task == "segmentation":
        for k in range(2, 42):
            image = np.random.default_rng(k).normal(size=(8, 8, 8)).astype(np.float32)
            if k == 8:
                image[2:4] += 1e5
                image[:2] = image[4:] = 0
            nib.save(nib.Nifti1Image(image, np.eye(4)), raw / "imagesTr" / f"c{k}.nii.gz")
            shutil.copy(raw / "labelsTr" / "c0.nii.gz", raw / "labelsTr" / f"c{k}.nii.gz")
        (raw / "imagesTr" / "c7.nii.gz").write_bytes(b"nothing")
        return
    folder = raw / ("a" if task == "classification" else "images")
    rows = [""]
    for k in range(300):
        noise = np.random.default_rng(k).integers(0, 256, (16, 16 + k % 5), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"n{k}.png")
        rows.append(f"n{k}.png,1,1,9,9")
    (folder / "n7.png").write_bytes(b"nothing")
    if task == "detection":
        with open(raw / "boxes.csv", "a") as file:
            file.write("\n".join(rows))


# --- tables ---


def test_a_row_with_too_many_fields_is_named(tmp_path):
    raw = draw_raw(tmp_path / "raw", "detection")
    (raw / "boxes.csv").write_text(
        "image,xmin,ymin,xmax,ymax\n0.png,1,1,9,9\n1.png,1,5,1,5,9,5,9,5\n"
    )
    found = refusal("detection", raw, tmp_path / "out", "--skip-bad")
    assert "boxes.csv:3: 9 fields for 5 columns; decimal commas?" in found


def test_digits_with_an_underscore_are_no_number(tmp_path, capsys):
    raw = draw_raw(tmp_path / "raw", "detection")
    text = (raw / "boxes.csv").read_text()
    (raw / "boxes.csv").write_text(text.replace("0.png,1,1,9", "0.png,1,1,1_0"))
    refusal("detection", raw, tmp_path / "out")
    assert "0.png: box (1.0, 1.0, nan, 9.0)" in capsys.readouterr().err


def test_a_quote_that_is_not_closed_is_named(tmp_path):
    raw = draw_raw(tmp_path / "raw", "detection")
    rows = (raw / "boxes.csv").read_text().splitlines()
    rows[2] = f'"{rows[2]}'  # would swallow the rows below
    (raw / "boxes.csv").write_text("\n".join(rows))
    assert "boxes.csv:3: " in refusal("detection", raw, tmp_path / "out", "--skip-bad")
    rsna = tmp_path / "rsna"
    (rsna / "stage_2_train_images").mkdir(parents=True)
    (rsna / "stage_2_train_labels.csv").write_text('patientId,Target\na,0\nb,"1\nc,0\n')
    assert "labels.csv:3: " in refusal("classification", rsna, tmp_path / "out")


@pytest.mark.parametrize("values, message", [
    ([0, 1, -1, 0], "from -1 to 1"), ([0, 1, 200_000_000, 0], "to 200000000"),
    ([0.0, 1.7, 1.0, 0.0], "float64"),
])  # fmt: skip
def test_labels_that_are_no_classes_are_refused_at_once(tmp_path, values, message):
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.array(values)[:, None])
    assert message in refusal("classification", tmp_path / "a.npz", tmp_path / "out")


@TASKS
@pytest.mark.parametrize("meta", [{}, {"size": 32}, "another task"])
def test_like_needs_a_cache_of_the_task(tmp_path, task, meta):
    raw, like = draw_raw(tmp_path / "raw", task), tmp_path / "like"
    like.mkdir()
    (like / "meta.json").write_text(json.dumps(meta))
    if isinstance(meta, str):
        other = "detection" if task == "segmentation" else "segmentation"
        run(other, draw_raw(tmp_path / "other", other), tmp_path / "cache")
        like = tmp_path / "cache"
    assert "meta.json: " in refusal(task, raw, tmp_path / "out", "--like", str(like))


# --- what a file claims ---


def test_an_eps_never_starts_ghostscript(tmp_path, monkeypatch, capsys):
    raw = draw_raw(tmp_path / "raw", "classification")
    (raw / "a" / "evil.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program is started"))
    monkeypatch.setattr(
        subprocess, "check_call", lambda *_, **__: pytest.fail("a program is started")
    )
    refusal("classification", raw, tmp_path / "out")
    assert "evil.png: neither DICOM nor JPEG, PNG or TIFF" in capsys.readouterr().err


@XRAYS
def test_a_size_that_a_few_bytes_claim_is_not_believed(tmp_path, task):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = RLELossless
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = ComputedRadiographyImageStorage, "1.2.3", "p"
    ds.Rows = ds.Columns = 40_000
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = encapsulate([bytes(64) + b"\x81\x00" * 100])
    ds["PixelData"].VR = "OB"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(script(task).DataError, match="40000 x 40000 pixels, expected at most"):
        script(task).read_image(tmp_path / "a.dcm")


@TASKS
def test_a_pipe_does_not_hang(tmp_path, task):
    os.mkfifo(tmp_path / "a.nii.gz")
    read = script(task).read_volume if task == "segmentation" else script(task).read_image
    with pytest.raises(script(task).DataError, match=r"neither a file|not a file"):
        read(tmp_path / "a.nii.gz")


@TASKS
def test_control_characters_of_a_name_do_not_reach_the_screen(tmp_path, task, capsys):
    raw = draw_raw(tmp_path / "raw", task)
    name = "evil\x1b[2J\x07"
    if task == "segmentation":
        for kind in ("imagesTr", "labelsTr"):
            (raw / kind / "c1.nii.gz").rename(raw / kind / f"{name}.nii.gz")
    else:
        source = next(raw.rglob("1.png"))
        source.rename(source.with_name(f"{name}.png"))
        if task == "detection":
            table = raw / "boxes.csv"
            table.write_text(table.read_text().replace("1.png", f"{name}.png"))
    refusal(task, raw, tmp_path / "out")
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err
    assert r"evil\x1b[2J\x07" in captured.err
    run(task, raw, tmp_path / "out", "--skip-bad")
    assert b"\x1b" not in (tmp_path / "out" / "index.csv").read_bytes()


def test_a_flipped_bit_of_a_gzip_stream_is_found(tmp_path, capsys):
    raw = draw_raw(tmp_path / "raw", "segmentation")
    path = raw / "imagesTr" / "c0.nii.gz"
    data = gzip.decompress(path.read_bytes())
    buffer = io.BytesIO()
    with gzip.GzipFile(
        fileobj=buffer, mode="wb", compresslevel=0
    ) as file:  # stored: a flip changes a voxel only
        file.write(data)
    broken = bytearray(buffer.getvalue())
    broken[-200] ^= 1
    path.write_bytes(broken)
    refusal("segmentation", raw, tmp_path / "out")
    assert "c0.nii.gz" in capsys.readouterr().err


def test_a_bright_object_on_zeros_is_named_or_finite(tmp_path, capsys):
    raw = draw_raw(tmp_path / "raw", "segmentation")
    voxels = np.zeros((60, 60, 60), np.float32)
    voxels[:30] = np.random.default_rng(0).normal(1, 1e-3, (30, 60, 60))
    voxels[0, 0, 0] = 1e9
    mask = np.zeros(voxels.shape, np.uint8)
    mask[3:9, 3:9, 3:9] = 1
    for kind, array in (("imagesTr", voxels), ("labelsTr", mask)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), raw / kind / "c9.nii.gz")
    try:
        run("segmentation", raw, tmp_path / "out")
    except script("segmentation").DataError:
        assert "c9.nii.gz" in capsys.readouterr().err
        return
    image = np.load(tmp_path / "out" / "volumes" / "c9.image.npy")
    assert np.isfinite(image).all()


def test_a_spacing_of_a_hair_is_one_line(tmp_path, capsys):
    raw = draw_raw(tmp_path / "raw", "segmentation")
    for path in raw.rglob("*.nii.gz"):  # a trunk of 40 cm
        nib.save(
            nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj), np.diag([50, 50, 50, 1])), path
        )
    found = refusal("segmentation", raw, tmp_path / "out", "--spacing", "0.02", "0.02", "0.02")
    assert "cannot be used" in found and "c0" in capsys.readouterr().err


def test_a_group_that_a_regex_leaves_empty_is_one_line(tmp_path):
    raw = draw_raw(tmp_path / "raw", "detection")
    assert "--site-regex" in refusal("detection", raw, tmp_path / "out", "--site-regex", "^(x)?")


@pytest.mark.parametrize("text, expected", [
    ("a b", "a b"), ("é 日本", "é 日本"), ("a\nb\r\n c", "a b c"), ("\x1b[31m", r"\x1b[31m"),
    ("\u202e", r"\u202e"), ("Screenshot\u202f3 PM", "Screenshot\u202f3 PM"), ("\udce9", r"\udce9"),
])  # fmt: skip
def test_one_line_shows_letters_and_escapes_the_rest(text, expected):
    assert script("classification").one_line(text) == expected


@TASKS
def test_names_that_a_screen_lacks_are_escaped(tmp_path, task):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    raw = draw_raw(tmp_path / "日本", task)  # is printed with what was found in it
    command = [
        sys.executable,
        ROOT / task / "preprocess.py",
        "--data",
        raw,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u65e5\\u672c: " in done.stdout
