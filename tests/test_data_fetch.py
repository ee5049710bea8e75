"""Fetching data sets: from a real server on the loopback, resumable, checked and safe."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from effspinenet_lib.cli import app
from effspinenet_lib.data import DataConfig, detect_format, open_dataset
from effspinenet_lib.data import fetch as fetching
from effspinenet_lib.data.fetch import (
    KNOWN_SETS,
    Archive,
    ExpectedPart,
    KnownSet,
    augmented_list,
    fetch,
    unpack,
)
from effspinenet_lib.errors import DataError, UnknownName, UserError

MAT_FILES = Path(__file__).parent / "data" / "mat"


@dataclass
class FileServer:
    """Files of a server, and what it was asked and does."""

    files: dict[str, bytes] = field(default_factory=dict)
    knows_ranges: bool = True
    breaks_after: list[int] = field(default_factory=list)  # bytes of the next answers
    resets: bool = False  # what it breaks off it breaks off as a machine that crashed does
    status: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[FileServer]:
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path.lstrip("/"), self.headers.get("Range")
            state.asked.append((name, wanted))
            if state.status or name not in state.files:
                self.send_error(state.status or 404)
                return
            content, start = state.files[name], 0
            if wanted and state.knows_ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            piece = content[start:]
            if state.breaks_after:
                piece = piece[: state.breaks_after.pop(0)]
            self.wfile.write(piece)
            self.close_connection = True
            if state.resets and len(piece) < len(content) - start:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()  # before the server says that it has no more

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT_SECONDS", 0.001)


def described(name: str, content: bytes) -> Archive:
    checksum = f"sha1:{hashlib.sha1(content).hexdigest()}"
    return Archive(f"http://nowhere.invalid/{name}", len(content), checksum)


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w", *members: tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in members:
            archive.addfile(entry)
    return packed.getvalue()


def picture(kind: str = "JPEG", size: tuple[int, int] = (7, 5), value: int = 3) -> bytes:
    stream = io.BytesIO()
    shape = (size[1], size[0], 3) if kind == "JPEG" else (size[1], size[0])
    Image.fromarray(np.full(shape, value, np.uint8)).save(stream, kind)
    return stream.getvalue()


# The download


CONTENT = np.random.default_rng(0).bytes(300_000)


def fetched(server: FileServer, path: Path) -> bytes:
    return fetching.download(described(path.name, CONTENT), path, server.url).read_bytes()


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_connection_is_resumed(
    server: FileServer, tmp_path: Path, knows_ranges: bool, resets: bool
) -> None:
    server.files["a.bin"] = CONTENT
    server.breaks_after, server.knows_ranges = [100_000, 50_000], knows_ranges
    server.resets = resets
    assert fetched(server, tmp_path / "a.bin") == CONTENT
    if not resets:  # what a reset connection has delivered is up to the system
        # Without ranges the answers begin again, and 50,000 bytes are less than there were.
        assert [asked for _, asked in server.asked[:2]] == [None, "bytes=100000-"]
        third = "bytes=150000-" if knows_ranges else "bytes=50000-"
        assert server.asked[2] == ("a.bin", third)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_later_call_goes_on_with_what_an_earlier_one_left(
    server: FileServer, tmp_path: Path
) -> None:
    server.files["a.bin"] = CONTENT
    server.breaks_after = [120_000] + [0] * fetching.ATTEMPTS
    with pytest.raises(DataError, match=r"broke off.*the same command resumes from it"):
        fetched(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:120_000]
    server.asked.clear()
    assert fetched(server, tmp_path / "a.bin") == CONTENT
    assert server.asked == [("a.bin", "bytes=120000-")]
    server.asked.clear()
    assert fetched(server, tmp_path / "a.bin") == CONTENT
    assert not server.asked


def test_another_file_is_named_and_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT + b"more"
    with pytest.raises(DataError, match="has 300004 bytes, not 300000"):
        fetched(server, tmp_path / "a.bin")
    server.files["a.bin"] = CONTENT
    for rest in (b"?" * 200_000, b"?" * 300_000):
        (tmp_path / "a.bin.part").write_bytes(rest)
        expected = hashlib.sha1(CONTENT).hexdigest()
        with pytest.raises(DataError, match=f"wrong checksum: sha1 .*, expected {expected}"):
            fetched(server, tmp_path / "a.bin")
        assert not list(tmp_path.iterdir())
    assert fetched(server, tmp_path / "a.bin") == CONTENT


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, fetching.ATTEMPTS)])
def test_what_a_second_try_may_mend_is_tried_again(
    server: FileServer, tmp_path: Path, status: int, requests: int
) -> None:
    server.status = status
    with pytest.raises(DataError, match=r"a\.bin: (HTTP Error 40|cannot be fetched)"):
        fetched(server, tmp_path / "a.bin")
    assert len(server.asked) == requests


def test_an_unreachable_server_and_another_scheme_are_one_line(tmp_path: Path) -> None:
    archive = described("a.bin", CONTENT)
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        fetching.download(archive, tmp_path / "a.bin", "http://127.0.0.1:1")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="only http"):
        fetching.download(archive, tmp_path / "a.bin", "file:///etc")


# The archives


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def link(kind: bytes, name: str = "a/link") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "../../etc/passwd"
    return entry


HARMFUL: dict[str, tuple[str, Callable[[], bytes]]] = {
    "up": ("x.tar", lambda: tarred({"ok": b"1", "../../out": b"2"})),
    "symlink out": ("x.tar", lambda: tarred({}, "w", link(tarfile.SYMTYPE))),
    "hard link out": ("x.tar", lambda: tarred({}, "w", link(tarfile.LNKTYPE))),
    "device": ("x.tar", lambda: tarred({}, "w", link(tarfile.CHRTYPE))),
    "inner": ("x.tar", lambda: tarred({"n01.tar": tarred({"../../../up": b"1"})})),
    "zip cut": ("x.zip", lambda: zipped({"a": CONTENT[:900]})[:-40]),
    "zip flipped": ("x.zip", lambda: zipped({"a": CONTENT}).replace(CONTENT[900:910], bytes(10))),
    "tar cut": ("x.tar", lambda: tarred({"a": CONTENT[:5000]})[:3000]),
    "tgz cut": ("x.tgz", lambda: tarred({"a": CONTENT[:5000]}, "w:gz")[:3000]),
    "inner cut": ("x.tar", lambda: tarred({"n01.tar": tarred({"a": CONTENT[:5000]})[:3000]})),
    "no tar": ("x.tar", lambda: CONTENT[:5000]),
    "empty": ("x.zip", lambda: b""),
}


def everything(name: str, _: Path) -> str:
    return name


@pytest.mark.parametrize("case", HARMFUL)
def test_a_harmful_or_damaged_archive_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content = HARMFUL[case]
    archive = written(tmp_path, name, content())
    with pytest.raises(DataError, match="is damaged or unsafe") as caught:
        unpack(archive, tmp_path / "inner" / "tree", everything)
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {name, "inner"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_names_that_lead_out_of_a_zip_are_written_inside(tmp_path: Path) -> None:
    archive = written(tmp_path, "x.zip", zipped({"../../out": b"2", "/abs": b"2"}))
    unpack(archive, tmp_path / "inner" / "tree", everything)
    assert {p.name for p in tmp_path.iterdir()} == {"x.zip", "inner"}
    assert (tmp_path / "inner" / "tree" / "abs").read_bytes() == b"2"


def test_unpacking_again_writes_only_what_is_missing(tmp_path: Path) -> None:
    inner = tarred({"a": b"one", "b": b"two"})
    archive = written(tmp_path, "x.tar", tarred({"n01.tar": inner}))
    tree = tmp_path / "out"
    assert unpack(archive, tree, everything) == 2
    before = (tree / "n01" / "a").stat().st_ctime_ns
    (tree / "n01" / "b").write_bytes(b"t")  # as a kill leaves it
    assert unpack(archive, tree, everything) == 2
    assert (tree / "n01" / "a").stat().st_ctime_ns == before
    assert (tree / "n01" / "b").read_bytes() == b"two"


# The data sets


def coco_archives() -> dict[str, bytes]:
    def annotations(numbers: range) -> bytes:
        content = {
            "images": [
                {"id": n, "file_name": f"{n:012d}.jpg", "width": 7, "height": 5} for n in numbers
            ],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 3, 3]} for n in numbers
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        return json.dumps(content).encode()

    return {
        "annotations.zip": zipped(
            {
                "annotations/instances_train2017.json": annotations(range(1, 5)),
                "annotations/instances_val2017.json": annotations(range(5, 7)),
                "annotations/captions_val2017.json": b"{}",
            }
        ),
        "val2017.zip": zipped({f"val2017/{n:012d}.jpg": picture() for n in range(5, 7)}),
        "train2017.zip": zipped({f"train2017/{n:012d}.jpg": picture() for n in range(1, 5)}),
    }


def install(
    monkeypatch: pytest.MonkeyPatch,
    server: FileServer,
    name: str,
    archives: dict[str, bytes],
    parts: tuple[ExpectedPart, ...],
) -> KnownSet:
    """A small data set in the place of a public one."""
    small = replace(
        KNOWN_SETS[name],
        archives=tuple(described(file, content) for file, content in archives.items()),
        parts=parts,
    )
    monkeypatch.setitem(KNOWN_SETS, name, small)
    server.files.update(archives)
    return small


@pytest.fixture
def coco(monkeypatch: pytest.MonkeyPatch, server: FileServer) -> KnownSet:
    parts = (ExpectedPart("train2017", 4, 4, 1), ExpectedPart("val2017", 2, 2, 1))
    return install(monkeypatch, server, "coco", coco_archives(), parts)


def test_coco_becomes_a_folder_that_trains(
    coco: KnownSet, server: FileServer, tmp_path: Path
) -> None:
    folder = tmp_path / "coco"
    assert fetch("coco", folder, server.url)
    assert detect_format(folder) == "coco"
    config = DataConfig("coco", str(folder))
    assert [len(open_dataset(config, part)) for part in ("train", "eval")] == [4, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".fetched.json", "annotations", "train2017", "val2017",
    ]  # fmt: skip
    assert not (folder / "annotations" / "captions_val2017.json").exists()
    server.asked.clear()
    assert not fetch("coco", folder, server.url)
    assert not server.asked
    with pytest.raises(UserError, match="holds coco; choose another folder"):
        fetch("voc", folder, server.url)


def test_the_command_fetches_and_says_how_to_check(
    coco: KnownSet, server: FileServer, tmp_path: Path
) -> None:
    folder = tmp_path / "coco"
    done = CliRunner().invoke(app, ["data", "fetch", "coco", str(folder), "--source", server.url])
    assert done.exit_code == 0, done.output
    assert f"effspinenet data check {folder} --expect coco" in done.output
    checked = CliRunner().invoke(app, ["data", "check", str(folder), "--expect", "coco"])
    assert checked.exit_code == 0, checked.output


def test_an_interrupted_fetch_shows_no_half_folder_and_goes_on(
    coco: KnownSet, server: FileServer, tmp_path: Path
) -> None:
    folder = tmp_path / "coco"
    train = server.files.pop("train2017.zip")
    with pytest.raises(DataError, match="HTTP Error 404"):
        fetch("coco", folder, server.url)
    assert [path.name for path in folder.iterdir()] == [".fetching-coco"]
    server.files["train2017.zip"] = train
    server.asked.clear()
    assert fetch("coco", folder, server.url)
    assert [name for name, _ in server.asked] == ["train2017.zip"]
    assert (folder / "train2017").is_dir()


def test_a_fetch_killed_while_folders_take_their_places_goes_on(
    coco: KnownSet, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "coco"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        rename = Path.rename
        patch.setattr(
            Path, "rename",
            lambda path, to: interrupted() if path.name == "val2017" else rename(path, to),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            fetch("coco", folder, server.url)
    assert (folder / "train2017").is_dir()
    assert not (folder / "val2017").exists()
    server.asked.clear()
    assert fetch("coco", folder, server.url)
    assert not server.asked
    assert len(open_dataset(DataConfig("coco", str(folder)), "eval")) == 2


def test_what_cannot_be_finished_is_refused_before_anything_is_fetched(
    coco: KnownSet, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "val2017").mkdir()
    with pytest.raises(UserError, match="val2017: exists; choose another folder"):
        fetch("coco", tmp_path, server.url)
    with pytest.raises(UnknownName, match=r"coco, imagenet, voc|did you mean coco"):
        fetch("kokoo", tmp_path, server.url)
    folder = tmp_path / "other"
    (folder / ".fetching-coco").mkdir(parents=True)
    with (
        FileLock(folder / ".fetching-coco" / "lock"),
        pytest.raises(UserError, match="another process fetches into it"),
    ):
        fetch("coco", folder, server.url)
    large = replace(coco, archives=tuple(replace(a, size=10**16) for a in coco.archives))
    monkeypatch.setitem(KNOWN_SETS, "coco", large)
    with pytest.raises(UserError, match=r"40000000\.0 GB are needed, .* GB are free"):
        fetch("coco", folder, server.url)
    assert not server.asked


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_is_told_in_one_line(
    coco: KnownSet, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / ".fetching-coco").mkdir()
    (tmp_path / ".fetching-coco" / "annotations.zip.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device; what is there is kept"):
        fetch("coco", tmp_path, server.url)
    assert len(server.asked) == 1


def test_the_archives_that_a_user_has_are_checked_and_kept(
    coco: KnownSet, server: FileServer, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name, content in server.files.items():
        (own / name).write_bytes(content)
    assert fetch("coco", tmp_path / "coco", None, own)
    assert sorted(path.name for path in own.iterdir()) == sorted(server.files)
    (own / "val2017.zip").write_bytes(server.files["val2017.zip"][:-1] + b"?")
    with pytest.raises(DataError, match=r"val2017\.zip: wrong checksum"):
        fetch("coco", tmp_path / "other", None, own)


SBD_MAT = MAT_FILES / "sbd.mat"  # 7 x 5 pixels: class 15 in a rectangle, one pixel void


def voc_archives() -> dict[str, bytes]:
    """VOC: train a, b; val c. SBD: train b, c, d; val e. So train_aug is a, b, d, e."""
    stems = "abcde"
    files = {f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg": picture() for stem in stems}
    lists = {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n"}
    for name, text in lists.items():
        files[f"VOCdevkit/VOC2012/ImageSets/Segmentation/{name}.txt"] = text.encode()
        files[f"VOCdevkit/VOC2012/ImageSets/Main/{name}.txt"] = text.encode()
    for stem in stems:
        files[f"VOCdevkit/VOC2012/Annotations/{stem}.xml"] = b"<annotation/>"
    for stem in "abc":
        labels = picture("PNG", value=1 + stems.index(stem))
        files[f"VOCdevkit/VOC2012/SegmentationClass/{stem}.png"] = labels
    sbd = {f"benchmark_RELEASE/dataset/cls/{s}.mat": SBD_MAT.read_bytes() for s in "bcde"}
    sbd |= {"benchmark_RELEASE/dataset/train.txt": b"b\nc\nd\n"}
    sbd |= {"benchmark_RELEASE/dataset/val.txt": b"e\n"}
    sbd |= {"benchmark_RELEASE/dataset/img/b.jpg": picture(), "benchmark_RELEASE/README": b"x"}
    return {"voc.tar": tarred(files), "benchmark.tgz": tarred(sbd, "w:gz")}


def test_voc_gains_the_label_maps_of_sbd(
    monkeypatch: pytest.MonkeyPatch, server: FileServer, tmp_path: Path
) -> None:
    parts = (ExpectedPart("train", 2, None, 20), ExpectedPart("train_aug", 4, None, 20))
    install(monkeypatch, server, "voc", voc_archives(), parts)
    folder = tmp_path / "voc"
    assert fetch("voc", folder, server.url)
    assert (folder / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nb\nd\ne\n"
    assert sorted(path.name for path in (folder / "SegmentationClassAug").iterdir()) == [
        "d.png", "e.png",
    ]  # fmt: skip
    assert not list(folder.rglob("*.mat"))
    config = DataConfig("voc_segmentation", str(folder), train_split="train_aug")
    dataset = open_dataset(config, "train", "segmentation")
    maps = [dataset.semantic(index) for index in range(4)]
    assert [int(labels.max()) for labels in maps[:2]] == [1, 2]  # VOC's own
    expected = np.zeros((5, 7), np.uint8)
    expected[1:4, 2:5], expected[0, 0] = 15, 255
    assert (maps[2] == expected).all()
    assert detect_format(folder, "segmentation") == "voc_segmentation"
    assert detect_format(folder) == "voc"


def test_a_list_of_another_length_than_the_papers_is_refused(
    monkeypatch: pytest.MonkeyPatch, server: FileServer, tmp_path: Path
) -> None:
    install(monkeypatch, server, "voc", voc_archives(), KNOWN_SETS["voc"].parts)
    with pytest.raises(DataError, match="train_aug has 4 images, not 10582"):
        fetch("voc", tmp_path / "voc", server.url)


def test_the_augmented_list_has_every_set_but_vocs_val(tmp_path: Path) -> None:
    """As many names as the released lists hold; how they overlap is made up."""
    names = [f"2008_{number:06d}" for number in range(20_000)]
    sbd, vocs = set(names[:11_355]), set(names[10_251:11_715])
    val = {*names[:1_133], *names[15_000:15_316]}
    voc, other = tmp_path / "ImageSets" / "Segmentation", tmp_path / "sbd"
    for path, stems in (
        (other / "train.txt", names[:8_498]),
        (other / "val.txt", names[8_498:11_355]),
        (voc / "train.txt", vocs),
        (voc / "val.txt", val),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(stems))
    assert (len(vocs), len(val)) == (1_464, 1_449)
    found = augmented_list(tmp_path, other)
    assert len(found) == 10_582
    assert found == sorted((sbd | vocs) - val)


def imagenet_archives() -> dict[str, bytes]:
    """Three classes; the development kit numbers them n03, n01, n02."""
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": (MAT_FILES / "meta.mat").read_bytes(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n3\n1\n",
        "ILSVRC2012_devkit_t12/readme.txt": b"hello",
    }
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": picture(value=n) for n in range(1, 5)}
    train = {
        f"{name}.tar": tarred({f"{name}_{n}.JPEG": picture() for n in range(count)})
        for name, count in (("n01", 2), ("n02", 3), ("n03", 1))
    }
    return {
        "devkit.tar.gz": tarred(devkit, "w:gz"),
        "val.tar": tarred(val),
        "train.tar": tarred(train),
    }


def test_imagenets_archives_become_a_folder_a_class(
    monkeypatch: pytest.MonkeyPatch, server: FileServer, tmp_path: Path
) -> None:
    parts = (ExpectedPart("train", 6, None, 3), ExpectedPart("val", 4, None, 3))
    archives = imagenet_archives()
    install(monkeypatch, server, "imagenet", archives, parts)
    folder, own = tmp_path / "imagenet", tmp_path / "own"
    with pytest.raises(UserError, match=r"get devkit\.tar\.gz, val\.tar, train\.tar from https://"):
        fetch("imagenet", folder)
    own.mkdir()
    for name in ("devkit.tar.gz", "val.tar"):
        (own / name).write_bytes(archives[name])
    with pytest.raises(UserError, match=r"get train\.tar from https://"):
        fetch("imagenet", folder, archives=own)
    (own / "train.tar").write_bytes(archives["train.tar"])
    assert fetch("imagenet", folder, archives=own)
    assert not server.asked
    classes = {path.name: path.parent.name for path in (folder / "val").rglob("*.JPEG")}
    numbered = ["n01", "n03", "n02", "n03"]
    assert classes == {f"ILSVRC2012_val_{n:08d}.JPEG": c for n, c in enumerate(numbered, start=1)}
    assert detect_format(folder) == "imagenet"
    dataset = open_dataset(DataConfig("imagenet", str(folder)), "train", "classification")
    assert len(dataset) == 6
    assert sorted(path.name for path in own.iterdir()) == sorted(archives)


def test_what_torchvision_knows_of_the_archives_is_the_same() -> None:
    from torchvision.datasets import imagenet, sbd, voc

    sums = {
        voc.DATASET_YEAR_DICT["2012"]["filename"]: voc.DATASET_YEAR_DICT["2012"]["md5"],
        sbd.SBDataset.filename: sbd.SBDataset.md5,
        **dict(imagenet.ARCHIVE_META.values()),
    }
    known = {a.name: a.checksum for s in (fetching.VOC, fetching.IMAGENET) for a in s.archives}
    assert known == {name: f"md5:{digits}" for name, digits in sums.items()}


@pytest.mark.parametrize(
    "content", [b"", SBD_MAT.read_bytes()[:300], (MAT_FILES / "meta.mat").read_bytes()]
)
def test_damaged_label_maps_are_named(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, "x.mat", content)
    with pytest.raises(DataError, match=r"x\.mat: ") as caught:
        fetching.sbd_labels(path)
    assert "\n" not in str(caught.value)
