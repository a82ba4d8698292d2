"""Every attack in one place: what it is, where it comes from, what it must see, what it wants, what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

from codefend.attacks.specs import AttackSpec, TextAttackSpec
from codefend.types import Attack

if TYPE_CHECKING:
    from codefend.attacks.text import TextAttack

Row = TypeVar("Row", AttackSpec, TextAttackSpec)


def _by_name(*specs: Row) -> dict[str, Row]:
    return {spec.name: spec for spec in specs}


def _lazy(module: str, attribute: str, **options: Any) -> Callable[[], Attack]:
    def build() -> Attack:
        return cast(Attack, getattr(import_module(module), attribute)(**options))

    return build


def _saying(module: str, attribute: str, *, says: bool = False) -> Callable[[str], TextAttack]:
    def build(say: str = "") -> TextAttack:
        options = {"say": say} if says and say else {}
        return cast("TextAttack", getattr(import_module(module), attribute)(**options))

    return build


def _planting_joint(say: str = "") -> TextAttack:
    from codefend.attacks.joint import Joint
    from codefend.attacks.text import Planted

    return Joint(text=Planted(say=say) if say else Planted(), name="joint-targeted")


ATTACKS: dict[str, AttackSpec] = _by_name(
    AttackSpec(
        "pgd",
        "projected gradient descent against the true answer",
        "Madry et al. 2018, arXiv 1706.06083",
        "white-box",
        _lazy("codefend.attacks.pgd", "PGD"),
    ),
    AttackSpec(
        "pgd-targeted",
        "projected gradient descent towards the attacker's sentence",
        "Madry et al. 2018, arXiv 1706.06083; Qi et al. 2023, arXiv 2306.13213",
        "white-box",
        _lazy("codefend.attacks.pgd", "PGD", name="pgd-targeted"),
        "targeted",
    ),
    AttackSpec(
        "apgd",
        "auto-PGD against the true answer: adaptive steps and restarts from the best",
        "Croce & Hein 2020, arXiv 2003.01690",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD"),
    ),
    AttackSpec(
        "apgd-targeted",
        "auto-PGD towards the attacker's sentence",
        "Croce & Hein 2020, arXiv 2003.01690; Schlarmann & Hein 2023, arXiv 2308.10741",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="apgd-targeted"),
        "targeted",
    ),
    AttackSpec(
        "feature",
        "auto-PGD that turns every vision token away from the clean ones",
        "VEAttack, ICLR 2026",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="feature"),
        "feature",
    ),
    AttackSpec(
        "feature-target",
        "auto-PGD that turns the vision tokens towards another image's",
        "AttackVLM (MF-ii), Zhao et al. 2023, arXiv 2305.16934",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="feature-target"),
        "feature-target",
    ),
    AttackSpec(
        "mifgsm",
        "sign steps with momentum, made to transfer",
        "Dong et al. 2018, arXiv 1710.06081",
        "white-box",
        _lazy("codefend.attacks.mifgsm", "MIFGSM"),
        steps=10,
    ),
    AttackSpec(
        "nifgsm",
        "momentum with a Nesterov look-ahead",
        "Lin et al. 2020, arXiv 1908.06281",
        "white-box",
        _lazy("codefend.attacks.mifgsm", "MIFGSM", nesterov=True, name="nifgsm"),
        steps=10,
    ),
    AttackSpec(
        "dim",
        "momentum over random resizes of the input",
        "Xie et al. 2019, arXiv 1803.06978",
        "white-box",
        _lazy("codefend.attacks.mifgsm", "MIFGSM", diversity=0.5, name="dim"),
        steps=10,
    ),
    AttackSpec(
        "cw",
        "Adam on the objective and the squared distance, inside the ball",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        _lazy("codefend.attacks.cw", "CW"),
    ),
    AttackSpec(
        "square",
        "random search with squares; scores only",
        "Andriushchenko et al. 2020, arXiv 1912.00049",
        "score",
        _lazy("codefend.attacks.square", "Square"),
        steps=5000,
    ),
    AttackSpec(
        "rgf",
        "sign steps along finite differences in random directions; scores only",
        "AttackVLM (MF-tt), Zhao et al. 2023, arXiv 2305.16934",
        "score",
        _lazy("codefend.contrib.attacks.rgf", "RGF"),
        steps=800,
    ),
    AttackSpec(
        "spsa",
        "Adam on two-sided random differences; scores only",
        "Uesato et al. 2018, arXiv 1802.05666",
        "score",
        _lazy("codefend.contrib.attacks.spsa", "SPSA"),
        steps=5000,
    ),
    AttackSpec(
        "noise",
        "best of ten uniform draws from the ball: the control",
        "uniform noise",
        "control",
        _lazy("codefend.attacks.noise", "Noise"),
        steps=1,
    ),
    AttackSpec(
        "apgd-margin",
        "auto-PGD on the margins of the true answer's tokens",
        "Croce & Hein 2020, arXiv 2003.01690; f6 of Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="apgd-margin"),
        "margin",
    ),
    AttackSpec(
        "apgd-margin-targeted",
        "auto-PGD on the margins of the attacker's sentence",
        "Croce & Hein 2020, arXiv 2003.01690; f6 of Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="apgd-margin-targeted"),
        "margin-targeted",
    ),
    AttackSpec(
        "cw-margin",
        "Adam on the margins of the true answer's tokens and the squared distance, inside the ball",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        _lazy("codefend.attacks.cw", "CW", name="cw-margin"),
        "margin",
    ),
    AttackSpec(
        "mf-it",
        "auto-PGD that turns the vision tokens towards the attacker's sentence",
        "AttackVLM (MF-it), Zhao et al. 2023, arXiv 2305.16934",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="mf-it"),
        "feature-text",
    ),
    AttackSpec(
        "word-head",
        "auto-PGD that turns every vision token from the word it is nearest to: cheap, and strong on a pocket",
        "Croce & Hein 2020, arXiv 2003.01690, on a pocket's own head (victims.pocket.Pocket.word_scores)",
        "white-box",
        _lazy("codefend.attacks.apgd", "APGD", name="word-head"),
        "feature-words",
    ),
    AttackSpec(
        "ssa-cwa",
        "common weakness attack over simulated spectra, away from the clean tokens; made to transfer",
        "Dong et al. 2023, arXiv 2309.11751; SSA 2207.05382, CWA 2303.09105",
        "white-box",
        _lazy("codefend.attacks.ssa_cwa", "SSACWA"),
        "feature",
        steps=500,
    ),
    AttackSpec(
        "pureproof",
        "towards another image through a surrogate denoiser at random strengths: made to survive purification",
        "PureProof, CVPR 2026 (reconstruction from a description)",
        "white-box",
        _lazy("codefend.contrib.attacks.pureproof", "PureProof"),
        "feature-target",
    ),
    AttackSpec(
        "stadv",
        "moves pixels by a smooth flow and adds nothing",
        "Xiao et al. 2018, arXiv 1801.02612",
        "white-box",
        _lazy("codefend.attacks.stadv", "StAdv"),
        bound="flow",
    ),
    AttackSpec(
        "perc-al",
        "steps down the objective and back in colour, inside a CIEDE2000 distance",
        "Zhao, Liu & Larson 2020, arXiv 1911.02466",
        "white-box",
        _lazy("codefend.contrib.attacks.perc_al", "PerCAL"),
        bound="colour",
    ),
    AttackSpec(
        "universal",
        "one perturbation for the whole batch",
        "Moosavi-Dezfooli et al. 2017, arXiv 1610.08401; Shafahi et al. 2020, arXiv 1811.11304",
        "white-box",
        _lazy("codefend.contrib.attacks.universal", "Universal"),
    ),
    AttackSpec(
        "patch",
        "any pixels inside one square at a random place",
        "Brown et al. 2017, arXiv 1712.09665; LaVAN, Karmon et al. 2018, arXiv 1801.02608",
        "white-box",
        _lazy("codefend.attacks.patch", "Patch"),
        bound="patch",
    ),
    AttackSpec(
        "patch-targeted",
        "a square that makes the model say the attacker's sentence",
        "Brown et al. 2017, arXiv 1712.09665; LaVAN, Karmon et al. 2018, arXiv 1801.02608",
        "white-box",
        _lazy("codefend.attacks.patch", "Patch", name="patch-targeted"),
        "targeted",
        bound="patch",
    ),
    AttackSpec(
        "square-text",
        "random search with squares against the text of the answer; for victims that only answer",
        "Andriushchenko et al. 2020, arXiv 1912.00049",
        "score",
        _lazy("codefend.attacks.square", "Square", name="square-text"),
        "answer",
        steps=1000,
    ),
    AttackSpec(
        "mf-tt",
        "random gradient-free steps towards the attacker's sentence in the answer's text",
        "AttackVLM (MF-tt), Zhao et al. 2023, arXiv 2305.16934",
        "score",
        _lazy("codefend.contrib.attacks.rgf", "RGF", name="mf-tt"),
        "answer-target",
        steps=800,
    ),
    AttackSpec(
        "corruption",
        "the worst of eleven common corruptions at severity 3: a control",
        "Hendrycks & Dietterich 2019, arXiv 1903.12261",
        "control",
        _lazy("codefend.attacks.corruptions", "Corruption"),
        steps=1,
        bound="none",
    ),
)


TEXT_ATTACKS: dict[str, TextAttackSpec] = _by_name(
    TextAttackSpec(
        "characters",
        "typos in the question, by random search",
        "after DeepWordBug, arXiv 1801.04354, and TextBugger, arXiv 1812.05271",
        "score",
        _saying("codefend.attacks.text", "Characters"),
        changes="prompt",
    ),
    TextAttackSpec(
        "glyphs",
        "letters of the question that only look alike, by random search",
        "after VIPER, Eger et al. 2019, arXiv 1903.11508",
        "score",
        _saying("codefend.attacks.text", "Glyphs"),
        changes="prompt",
    ),
    TextAttackSpec(
        "words",
        "small rewordings of the question, by random search",
        "operations of EDA, Wei & Zou 2019, arXiv 1901.11196",
        "score",
        _saying("codefend.attacks.text", "Words"),
        changes="prompt",
    ),
    TextAttackSpec(
        "planted",
        "an instruction planted beside the question",
        "after Perez & Ribeiro 2022, arXiv 2211.09527",
        "score",
        _saying("codefend.attacks.text", "Planted", says=True),
        "targeted",
        steps=5,
        changes="prompt",
    ),
    TextAttackSpec(
        "injection",
        "an instruction injected behind the question: plain, behind blank lines, as a new task, or all at once",
        "Liu et al. 2024, arXiv 2310.12815",
        "score",
        _saying("codefend.attacks.text", "Injection", says=True),
        "targeted",
        steps=5,
        changes="prompt",
    ),
    TextAttackSpec(
        "typographic",
        "the attacker's sentence written into the picture",
        "Goh et al. 2021 (Multimodal Neurons); FigStep, arXiv 2311.05608",
        "score",
        _saying("codefend.attacks.typographic", "Typographic", says=True),
        "targeted",
        steps=6,
        changes="image",
    ),
    TextAttackSpec(
        "joint",
        "typos and auto-PGD in turns",
        "after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655",
        "white-box",
        _saying("codefend.attacks.joint", "Joint"),
        changes="both",
    ),
    TextAttackSpec(
        "joint-targeted",
        "a planted instruction and auto-PGD in turns, towards the attacker's sentence",
        "after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655",
        "white-box",
        _planting_joint,
        "targeted",
        changes="both",
    ),
)

EVERY_ATTACK: dict[str, AttackSpec | TextAttackSpec] = {**ATTACKS, **TEXT_ATTACKS}
