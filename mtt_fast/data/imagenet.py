"""ImageNet-1K and the ten-class subsets of the trajectory-matching papers, from an ImageNet tree or fastai's."""

from __future__ import annotations

from pathlib import Path

from mtt_fast.data.folder import class_folders, image_source
from mtt_fast.data.images import list_images
from mtt_fast.data.packing import Source
from mtt_fast.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_CLASSES = 1000
_RES = 128  # the papers' resolution for the subsets

# WordNet id -> name, in the public code's class order. That code numbers them by rank among the sorted 1000 ids
# (imagenette: 0 217 482 491 497 566 569 571 574 701); by id they are found in trees that hold only some classes, too.
SUBSETS = {
    "imagenette": {
        "n01440764": "tench",
        "n02102040": "English_springer",
        "n02979186": "cassette_player",
        "n03000684": "chain_saw",
        "n03028079": "church",
        "n03394916": "French_horn",
        "n03417042": "garbage_truck",
        "n03425413": "gas_pump",
        "n03445777": "golf_ball",
        "n03888257": "parachute",
    },
    "imagewoof": {
        "n02096294": "Australian_terrier",
        "n02093754": "Border_terrier",
        "n02111889": "Samoyed",
        "n02088364": "beagle",
        "n02086240": "Shih-Tzu",
        "n02089973": "English_foxhound",
        "n02087394": "Rhodesian_ridgeback",
        "n02115641": "dingo",
        "n02099601": "golden_retriever",
        "n02105641": "Old_English_sheepdog",
    },
    "imagemeow": {
        "n02123045": "tabby",
        "n02123159": "tiger_cat",
        "n02123394": "Persian_cat",
        "n02123597": "Siamese_cat",
        "n02124075": "Egyptian_cat",
        "n02129165": "lion",
        "n02129604": "tiger",
        "n02128925": "jaguar",
        "n02128757": "snow_leopard",
        "n02127052": "lynx",
    },
    "imagesquawk": {
        "n01806143": "peacock",
        "n02007558": "flamingo",
        "n01818515": "macaw",
        "n02051845": "pelican",
        "n02056570": "king_penguin",
        "n01614925": "bald_eagle",
        "n01843383": "toucan",
        "n01518878": "ostrich",
        "n01860187": "black_swan",
        "n01819313": "sulphur-crested_cockatoo",
    },
    "imagefruit": {
        "n07753275": "pineapple",
        "n07753592": "banana",
        "n07745940": "strawberry",
        "n07747607": "orange",
        "n07749582": "lemon",
        "n07768694": "pomegranate",
        "n07753113": "fig",
        "n07720875": "bell_pepper",
        "n07718472": "cucumber",
        "n07742313": "Granny_Smith",
    },
    "imageyellow": {
        "n02206856": "bee",
        "n12057211": "yellow_lady's_slipper",
        "n07753592": "banana",
        "n07749582": "lemon",
        "n12144580": "corn",
        "n04146614": "school_bus",
        "n03530642": "honeycomb",
        "n02129165": "lion",
        "n01773157": "garden_spider",
        "n01531178": "goldfinch",
    },
}


def source(data_path: Path, subset: str | None, res: int | None) -> Source:
    """Describe ImageNet, or one of `SUBSETS`, as 3 x res x res (default 128).

    Looked for in `data_path` and its sub-folders ImageNet/ and imagenet/, for a subset also in those that fastai's
    archives unpack to (imagenette/, imagenette2/, imagenette2-320/, imagenette2-160/): train/WNID/… and val/WNID/…, of
    which the latter is the test split. The shorter side is resized to `res`, bilinear and antialiased, on bytes; then
    the centre is cropped. (The public code resizes the normalised tensors: the same up to rounding to whole grey
    values, if its torchvision antialiases tensors, as it does by default since 0.17.)
    Raises `InputError` if classes are missing.
    """
    size = res or _RES
    names = SUBSETS[subset] if subset else None
    root = _find(data_path, subset)
    if names is None:
        wnids = [folder.name for folder in class_folders(root / "train")]
        if len(wnids) != _CLASSES:
            raise InputError(
                f"{root / 'train'}: expected ImageNet's {_CLASSES} class folders, found {len(wnids)}; give --subset "
                f"({', '.join(SUBSETS)}), or name the folder itself: --dataset {root}"
            )
    else:
        wnids = list(names)
    return image_source(
        f"{subset or 'ImageNet'}-{size}",
        root,
        {wnid: list_images(root / "train" / wnid) for wnid in wnids},
        {wnid: list_images(root / "val" / wnid) for wnid in wnids},
        class_names=tuple(names.values()) if names else wnids,
        channels=3,
        size=size,
        resize=True,
        mean=MEAN,
        std=STD,
    )


def _find(data_path: Path, subset: str | None) -> Path:
    """Return the first likely folder that has train/ and val/, and in train/ all classes of `subset`."""
    places = [
        "",
        "ImageNet",
        "imagenet",
        *([subset, f"{subset}2", f"{subset}2-320", f"{subset}2-160"] if subset else []),
    ]
    wnids = list(SUBSETS[subset]) if subset else []
    missing = wnids
    for root in (data_path / place for place in places):
        if (root / "train").is_dir() and (root / "val").is_dir():
            lacking = [wnid for wnid in wnids if not (root / "train" / wnid).is_dir()]
            if not lacking:
                return root
            missing = min(missing, lacking, key=len)
    if subset:
        raise InputError(
            f"{subset}: expected train/WNID/ and val/WNID/ in {data_path} or its sub-folders "
            f"{', '.join(places[1:])}, found no training folder for {len(missing)} of {len(wnids)} classes "
            f"({', '.join(missing[:3])}…); mend --data_path"
        )
    raise InputError(
        f"ImageNet: expected train/WNID/ and val/WNID/ in {data_path} or its sub-folders {', '.join(places[1:])}, "
        "found none; mend --data_path (sort the validation images into class folders first)"
    )
