"""The public data sets that the paper uses: where they come from and what they should hold."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

_GB = 10**9

_COCO_SUMS = "SHA-1 as GluonCV's documentation lists it; COCO publishes none"
_TORCHVISION_SUMS = "MD5 as torchvision.datasets holds it; the publisher gives none"


@dataclass(frozen=True)
class Archive:
    """A file to fetch and unpack.

    Attributes:
        url: where its publisher offers it.
        size: in bytes, as its server says.
        checksum: `sha1:` or `md5:` and hexadecimal digits.
        checksum_source: who says so.
        unpacked: bytes that its content may have at most, and that are kept free for it.
    """

    url: str
    size: int
    checksum: str
    checksum_source: str
    unpacked: int

    @property
    def name(self) -> str:
        """The file's name."""
        return urlsplit(self.url).path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class ExpectedPart:
    """What a part of a data set should hold.

    Attributes:
        split: its name.
        images: their number.
        annotations: of boxes, degenerate ones and crowds included; None where there are none.
        classes: their number.
    """

    split: str
    images: int
    annotations: int | None
    classes: int


@dataclass(frozen=True)
class KnownSet:
    """A public data set.

    Attributes:
        name: for `effspinenet data fetch`.
        title: for people.
        format: of `DataConfig`.
        archives: in the order in which they are unpacked.
        folders: what the finished data folder holds.
        parts: what it should contain.
        terms: where the archives come from if the user has to get them; "" if they are fetched.
    """

    name: str
    title: str
    format: str
    archives: tuple[Archive, ...]
    folders: tuple[str, ...]
    parts: tuple[ExpectedPart, ...]
    terms: str = ""

    @property
    def disk_bytes(self) -> int:
        """Free space that fetching needs: all of the content and the largest archive."""
        content = sum(archive.unpacked for archive in self.archives)
        return content + (0 if self.terms else max(archive.size for archive in self.archives))


# Sizes are those that the servers announce. The numbers of images and annotations are the
# publishers': cocodataset.org, VOC 2012's development kit, SBD's page, the ILSVRC 2012 challenge;
# 10,582 is the paper's (section 5) and everyone's for VOC's train joined with SBD, less VOC's val.
COCO = KnownSet(
    name="coco",
    title="COCO 2017",
    format="coco",
    archives=(
        Archive(
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            252_907_541,
            "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3",
            _COCO_SUMS,
            1 * _GB,
        ),
        Archive(
            "http://images.cocodataset.org/zips/val2017.zip",
            815_585_330,
            "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41",
            _COCO_SUMS,
            1 * _GB,
        ),
        Archive(
            "http://images.cocodataset.org/zips/train2017.zip",
            19_336_861_798,
            "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5",
            _COCO_SUMS,
            21 * _GB,
        ),
    ),
    folders=("annotations", "train2017", "val2017"),
    parts=(
        ExpectedPart("train2017", 118_287, 860_001, 80),
        ExpectedPart("val2017", 5_000, 36_781, 80),
    ),
)

VOC = KnownSet(
    name="voc",
    title="PASCAL VOC 2012 with SBD's label maps",
    format="voc_segmentation",
    archives=(
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            1_999_639_040,
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
            _TORCHVISION_SUMS,
            2 * _GB,
        ),
        Archive(
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
            "semantic_contours/benchmark.tgz",
            1_419_539_633,
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            _TORCHVISION_SUMS,
            2 * _GB,
        ),
    ),
    folders=(
        "Annotations", "ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug",
    ),
    parts=(
        ExpectedPart("train", 1_464, None, 20),
        ExpectedPart("val", 1_449, None, 20),
        ExpectedPart("train_aug", 10_582, None, 20),
    ),
)  # fmt: skip

_IMAGENET_URL = "https://image-net.org/data/ILSVRC/2012"
IMAGENET = KnownSet(
    name="imagenet",
    title="ImageNet ILSVRC 2012",
    format="imagenet",
    archives=(
        Archive(
            f"{_IMAGENET_URL}/ILSVRC2012_devkit_t12.tar.gz",
            2_568_145,
            "md5:fa75699e90414af021442c21a62c3abf",
            _TORCHVISION_SUMS,
            _GB,
        ),
        Archive(
            f"{_IMAGENET_URL}/ILSVRC2012_img_val.tar",
            6_744_924_160,
            "md5:29b22e2961454d5413ddabcf34fc5622",
            _TORCHVISION_SUMS,
            7 * _GB,
        ),
        Archive(
            f"{_IMAGENET_URL}/ILSVRC2012_img_train.tar",
            147_897_477_120,
            "md5:1d675b47d978889d74fa0da5fadfb00e",
            _TORCHVISION_SUMS,
            148 * _GB,
        ),
    ),
    folders=("train", "val"),
    parts=(
        ExpectedPart("train", 1_281_167, None, 1000),
        ExpectedPart("val", 50_000, None, 1000),
    ),
    terms="https://image-net.org/download-images (an account and its terms are needed)",
)

KNOWN_SETS = {known.name: known for known in (COCO, VOC, IMAGENET)}
