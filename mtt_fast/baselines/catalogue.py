"""List the methods by name."""

from __future__ import annotations

from mtt_fast.baselines.atbptt import AtBpttOptions, atbptt
from mtt_fast.baselines.dd import DdOptions, dd
from mtt_fast.baselines.dm import DmOptions, dm
from mtt_fast.baselines.forgetting import ForgettingOptions, forgetting
from mtt_fast.baselines.gradient_matching import DcOptions, DsaOptions, dc, dsa
from mtt_fast.baselines.herding import HerdingOptions, herding
from mtt_fast.baselines.kmeans import KmeansOptions, kmeans
from mtt_fast.baselines.ld import LdOptions, ld
from mtt_fast.baselines.method import Method
from mtt_fast.baselines.random_images import RandomOptions, random_images
from mtt_fast.baselines.ratbptt import RatBpttOptions, ratbptt

METHODS = {
    "random": Method("Random", "random real images", RandomOptions, random_images),
    "herding": Method(
        "Herding",
        "Welling, Herding Dynamical Weights to Learn, ICML 2009; Rebuffi et al., iCaRL, CVPR 2017",
        HerdingOptions,
        herding,
    ),
    "forgetting": Method(
        "Forgetting",
        "Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019",
        ForgettingOptions,
        forgetting,
    ),
    "kmeans": Method(
        "K-means",
        "Cui et al., DC-BENCH: Dataset Condensation Benchmark, NeurIPS 2022 (Kmeans-emb)",
        KmeansOptions,
        kmeans,
    ),
    "dm": Method("DM", "Zhao & Bilen, Dataset Condensation with Distribution Matching, WACV 2023", DmOptions, dm),
    "dc": Method("DC", "Zhao et al., Dataset Condensation with Gradient Matching, ICLR 2021", DcOptions, dc),
    "dsa": Method(
        "DSA",
        "Zhao & Bilen, Dataset Condensation with Differentiable Siamese Augmentation, ICML 2021",
        DsaOptions,
        dsa,
    ),
    "dd": Method("DD", "Wang et al., Dataset Distillation, arXiv 1811.10959, 2018", DdOptions, dd),
    "ld": Method(
        "LD",
        "Bohdal et al., Flexible Dataset Distillation: Learn Labels Instead of Images, arXiv 2006.08572, 2020",
        LdOptions,
        ld,
    ),
    "ratbptt": Method(
        "RaT-BPTT",
        "Feng, Vedantam & Kempe, Embarrassingly Simple Dataset Distillation, ICLR 2024",
        RatBpttOptions,
        ratbptt,
    ),
    "atbptt": Method(
        "AT-BPTT",
        "Li et al., Beyond Random: Automatic Inner-loop Optimization in Dataset Distillation, NeurIPS 2025",
        AtBpttOptions,
        atbptt,
    ),
}
"""The methods by their names after `python -m mtt_fast.baselines`."""
