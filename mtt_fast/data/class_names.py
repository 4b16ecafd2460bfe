"""Classes by name: the official orders, the spellings people use, and which class a folder's name means.

A label that is the rank of a sorted folder name is right only where everybody sorts the same names. So `class_indices`
labels everything that has names: image folders, and other software's distilled sets.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from mtt_fast.errors import InputError

log = logging.getLogger(__name__)

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)  # fmt: skip

MNIST = tuple("0123456789")

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

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
    # GLaD's five
    "imagenet-a": {
        "n02111129": "Leonberg",
        "n02489166": "proboscis_monkey",
        "n11879895": "rapeseed",
        "n02457408": "three-toed_sloth",
        "n03042490": "cliff_dwelling",
        "n12057211": "yellow_lady's_slipper",
        "n02342885": "hamster",
        "n03447447": "gondola",
        "n02071294": "killer_whale",
        "n02013706": "limpkin",
    },
    "imagenet-b": {
        "n02006656": "spoonbill",
        "n06359193": "web_site",
        "n01820546": "lorikeet",
        "n02116738": "African_hunting_dog",
        "n13044778": "earthstar",
        "n04487081": "trolleybus",
        "n01872401": "echidna",
        "n02112018": "Pomeranian",
        "n03841143": "odometer",
        "n02025239": "ruddy_turnstone",
    },
    "imagenet-c": {
        "n03393912": "freight_car",
        "n01833805": "hummingbird",
        "n03344393": "fireboat",
        "n03208938": "disk_brake",
        "n01828970": "bee_eater",
        "n02606052": "rock_beauty",
        "n02129165": "lion",
        "n02017213": "European_gallinule",
        "n02280649": "cabbage_butterfly",
        "n01531178": "goldfinch",
    },
    "imagenet-d": {
        "n01518878": "ostrich",
        "n02111889": "Samoyed",
        "n01534433": "junco",
        "n02112706": "Brabancon_griffon",
        "n01592084": "chickadee",
        "n02389026": "sorrel",
        "n02276258": "admiral",
        "n01622779": "great_grey_owl",
        "n01829413": "hornbill",
        "n02277742": "ringlet",
    },
    "imagenet-e": {
        "n04277352": "spindle",
        "n01843383": "toucan",
        "n01860187": "black_swan",
        "n02056570": "king_penguin",
        "n03992509": "potter's_wheel",
        "n03924679": "photocopier",
        "n04153751": "screw",
        "n01774750": "tarantula",
        "n03857828": "oscilloscope",
        "n02281787": "lycaenid",
    },
}

# Other spellings, by data set and class; those of ImageNet and its subsets are WordNet's, in imagenet_classes.tsv.
_SPELLINGS = {
    CIFAR10: {
        "airplane": "plane aeroplane aircraft",
        "automobile": "auto car",
        "truck": "lorry",
        "ship": "boat",
    },
    CIFAR100: {
        "crab": "cra",  # the hub's list has it so
        "maple_tree": "maple",
        "oak_tree": "oak",
        "palm_tree": "palm",
        "pine_tree": "pine",
        "willow_tree": "willow",
        "pickup_truck": "pickup",
        "lawn_mower": "mower",
        "streetcar": "tram",
        "motorcycle": "motorbike",
        "sweet_pepper": "pepper",
        "television": "tv",
        "raccoon": "racoon",
        "couch": "sofa",
    },
    MNIST: dict(zip(MNIST, "zero one two three four five six seven eight nine".split(), strict=True)),
    FASHION_MNIST: {
        "T-shirt/top": "T-shirt tee-shirt",
        "Trouser": "trousers",
        "Ankle boot": "boot",
        "Pullover": "pull-over",
        "Sandal": "sandals",
        "Sneaker": "sneakers",
    },
}

_WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(\D*)(\d{1,18})")
_CLASS_NUMBER = re.compile(r"(?:(?:class|cls|category|label|target|new|c|y)[\W_]*)?(\d{1,18})")
_NAMED = 10  # classes in a line of the log


def is_wnid(name: str) -> bool:
    """Return whether `name` is formed as a WordNet id."""
    return _WNID.fullmatch(name) is not None


def in_order(names: Iterable[str]) -> list[str]:
    """Return folder names in the order of their classes: sorted, but by number where they differ only in a number.

    As text, "10" comes before "2", and labels 2 … 10 would all be others than their folders say.
    """
    listed = sorted(names)
    numbered = [(match[1], int(match[2]), name) for name in listed if (match := _NUMBERED.fullmatch(name))]
    if len(numbered) < len(listed) or len({text for text, _, _ in numbered}) > 1:
        return listed
    return [name for _, _, name in sorted(numbered)]


def class_indices(names: Sequence[str], class_names: Sequence[str], where: object) -> list[int]:
    """Return, for each of the `names`, the index in `class_names` of the class that it means.

    Case, separators and leading numbers ("003-cat") do not count. Of the data sets that are known by their
    `class_names`, common spellings, WordNet ids and WordNet's words are known too. Where all names are numbers they are
    class numbers: indices, or for a subset of ImageNet also ranks among its 1000 classes.
    `where` (a folder or file) is for the message. Raises `InputError` for a name that means no class, and for two that
    mean the same one.
    """
    meant = meant_classes(names, class_names, where)
    indices = [index for index in meant if index is not None]
    if len(indices) < len(names):
        raise _unknown(names[meant.index(None)], class_names, where)
    renamed = [f"{name} = {class_names[i]}" for name, i in zip(names, indices, strict=True) if name != class_names[i]]
    if renamed:
        log.info("%s: classes by name: %s", where, abbreviated(renamed))
    return indices


def meant_classes(names: Sequence[str], class_names: Sequence[str], where: object) -> list[int | None]:
    """Return the indices that `class_indices` returns, with None for names that mean no class: those of a larger data set."""
    known = _recognised(class_names)
    exact = {name: index for index, name in enumerate(class_names)}
    spelt = _by_spelling(known.spellings)
    indices = [exact.get(name, _spelt(name, spelt)) for name in names]
    if None in indices and (numbered := _numbered(names, known, where)):
        indices = list(numbered)
    _check_distinct(names, indices, class_names, where)
    return indices


def relabelled(labels: Tensor, indices: Sequence[int], num_classes: int, where: object) -> Tensor:
    """Return `labels` of classes in another order, where class i is class `indices[i]` of `num_classes`.

    Class indices (n,) int64 become others; the columns of soft labels (n, len(indices)) are moved.
    Raises `InputError`, which names `where`, for labels of other classes, and for soft ones that lack a class.
    """
    if labels.dim() == 1:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(indices):
            raise InputError(
                f"{where}: expected labels in [0, {len(indices)}), one for each class name, found {int(labels.min())} to "
                f"{int(labels.max())}; get it again"
            )
        return torch.tensor(indices, device=labels.device)[labels]
    if not labels.shape[1] == len(indices) == num_classes:
        raise InputError(
            f"{where}: expected soft labels of the data set's {num_classes} classes, found {labels.shape[1]} columns and "
            f"{len(indices)} class names; name the data set that it belongs to"
        )
    moved = torch.empty_like(labels)
    moved[:, torch.tensor(indices, device=labels.device)] = labels
    return moved


def abbreviated(items: Sequence[str]) -> str:
    """Return the items in one line; a long one is cut and ends with their number."""
    return ", ".join(items[:_NAMED]) + (f", … ({len(items)} in all)" if len(items) > _NAMED else "")


def imagenet_wnids() -> list[str]:
    """Return ImageNet's 1000 WordNet ids, sorted: in the order of its classes."""
    return list(_imagenet()[0])


def tiny_wnids() -> list[str]:
    """Return Tiny ImageNet's 200 WordNet ids, sorted."""
    return list(_imagenet()[1])


@dataclass(frozen=True)
class _Classes:
    """The classes of a data set: other names of each (normalised), and the numbers that people give them."""

    spellings: tuple[frozenset[str], ...]
    numberings: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1)
def _imagenet() -> tuple[dict[str, list[str]], list[str]]:
    """Return (words by WordNet id, ImageNet's 1000 in order; those of them that are Tiny ImageNet's).

    The words are WordNet's, as ILSVRC 2012 lists them, then the names of today's lists where these differ.
    """
    text = (resources.files("mtt_fast.data") / "imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return {wnid: words.split("; ") for wnid, _, words in rows}, [wnid for wnid, tiny, _ in rows if tiny == "tiny"]


@lru_cache(maxsize=1)
def _known_sets() -> tuple[_Classes, ...]:
    words, tiny = _imagenet()
    rank = {wnid: index for index, wnid in enumerate(words)}
    known = [_Classes(_spellings_of(names), (tuple(range(len(names))),)) for names in _SPELLINGS]
    for wnids in (list(words), tiny):
        known.append(_Classes(_wordnet(wnids), (tuple(range(len(wnids))),)))
    for subset in SUBSETS.values():
        words_or_own = zip(_wordnet(subset), subset.values(), strict=True)
        spellings = tuple(spelling | {_normalised(name)} for spelling, name in words_or_own)
        known.append(_Classes(spellings, (tuple(range(len(subset))), tuple(rank[wnid] for wnid in subset))))
    return tuple(known)


def _spellings_of(names: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    others = _SPELLINGS[names]
    return tuple(frozenset(map(_normalised, (name, *others.get(name, "").split()))) for name in names)


def _wordnet(wnids: Iterable[str]) -> tuple[frozenset[str], ...]:
    words = _imagenet()[0]
    return tuple(frozenset(map(_normalised, (wnid, *words.get(wnid, ())))) for wnid in wnids)


def _recognised(class_names: Sequence[str]) -> _Classes:
    """Return the known data set with these class names, or else what follows from the names."""
    for known in _known_sets():
        if len(class_names) == len(known.spellings) and all(
            _normalised(name) in spelling for name, spelling in zip(class_names, known.spellings, strict=True)
        ):
            return known
    return _Classes(_wordnet(class_names), (_own_numbers(class_names),))


def _own_numbers(class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers in the class names where these are numbers ("class_1" …), else the indices."""
    matches = [_CLASS_NUMBER.fullmatch(name.casefold()) for name in class_names]
    numbers = [int(match[1]) for match in matches if match]
    return tuple(numbers if len(numbers) == len(class_names) else range(len(class_names)))


def _by_spelling(spellings: Sequence[frozenset[str]]) -> dict[str, int]:
    """Return the class of each spelling that only one class has."""
    classes: dict[str, list[int]] = {}
    for index, names in enumerate(spellings):
        for name in names - {""}:
            classes.setdefault(name, []).append(index)
    return {name: indices[0] for name, indices in classes.items() if len(indices) == 1}


def _spelt(name: str, spelt: dict[str, int]) -> int | None:
    """Return the class that a name means by its words or its WordNet id."""
    for reading in _readings(name):
        if (index := spelt.get(reading)) is not None:
            return index
    number, rest = _number_and_rest(name)
    index = spelt.get(_normalised(rest))
    return index if index is not None and index == number else None


def _readings(name: str) -> Iterator[str]:
    yield _normalised(name)
    yield _normalised(name.partition(",")[0])  # "tench, Tinca tinca"
    if match := _WNID.match(name):
        yield match[0]  # "n01440764-tench"
    _, rest = _number_and_rest(name)
    if any(map(str.isalpha, rest)):
        yield from _readings(rest)  # "003-cat", "3 - three"


def _number_and_rest(name: str) -> tuple[int | None, str]:
    match = re.fullmatch(r"(\d{1,18})[\W_]+(.+)", name, re.DOTALL)
    return (int(match[1]), match[2]) if match else (None, "")


def _numbered(names: Sequence[str], known: _Classes, where: object) -> list[int] | None:
    """Return the classes that all names mean by their numbers, or None where they are no class numbers."""
    matches = [_CLASS_NUMBER.fullmatch(name.casefold()) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(names):
        return None
    readings = [
        [numbering.index(number) for number in numbers]
        for numbering in known.numberings
        if set(numbers) <= set(numbering)
    ]
    if any(reading != readings[0] for reading in readings):
        raise InputError(
            f"{where}: expected numbers that are either indices of classes or ranks among ImageNet's 1000, found "
            f"{abbreviated(names)}, which may be both; rename the folders after their classes"
        )
    return readings[0] if readings else None


def _check_distinct(
    names: Sequence[str], indices: Sequence[int | None], class_names: Sequence[str], where: object
) -> None:
    first: dict[int, str] = {}
    for name, index in zip(names, indices, strict=True):
        if index is None:
            continue
        if index in first:
            raise InputError(
                f"{where}: expected one name for each class, found {first[index]!r} and {name!r}, which both mean "
                f"{class_names[index]!r}; merge them"
            )
        first[index] = name


def _unknown(name: str, class_names: Sequence[str], where: object) -> InputError:
    spellings = _recognised(class_names).spellings
    several = [class_names[index] for index, names in enumerate(spellings) if _normalised(name) in names]
    spelt = _by_spelling(spellings)
    near = difflib.get_close_matches(_normalised(name), spelt, n=3, cutoff=0.5)
    if several:
        hint = f"which may be {' or '.join(several)}"
    elif near:
        hint = f"nearest: {', '.join(dict.fromkeys(class_names[spelt[one]] for one in near))}"
    else:
        hint = f"the classes are {abbreviated(class_names)}"
    return InputError(
        f"{where}: expected the names of the data set's {len(class_names)} classes, or numbers from 0 to "
        f"{len(class_names) - 1}, found {name!r} ({hint}); rename it, or name the data set that it belongs to"
    )


def _normalised(name: str) -> str:
    """Return the letters and digits of a name, in small letters; a number without leading zeros."""
    text = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))
    return (text.lstrip("0") or "0") if re.fullmatch(r"[0-9]+", text) else text
