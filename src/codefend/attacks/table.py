"""The table of all attacks: summary, source, requirements, objective and bound."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from codefend.attacks.specs import AttackSpec, TextAttackSpec

Row = TypeVar("Row", AttackSpec, TextAttackSpec)


_apgd = partial(AttackSpec, threat="white-box", algorithm="codefend.attacks.apgd:APGD")


def _by_name(*specs: Row) -> dict[str, Row]:
    return {spec.name: spec for spec in specs}


ATTACKS: dict[str, AttackSpec] = _by_name(
    AttackSpec(
        "pgd",
        "projected gradient descent against the true answer",
        "Madry et al. 2018, arXiv 1706.06083",
        "white-box",
        "codefend.attacks.pgd:PGD",
    ),
    AttackSpec(
        "pgd-decay",
        "projected gradient descent with momentum and falling steps, for stochastic defenses",
        "Madry et al. 2018, arXiv 1706.06083; momentum after Dong et al. 2018, arXiv 1710.06081",
        "white-box",
        "codefend.attacks.pgd:PGDDecay",
        steps=40,
    ),
    AttackSpec(
        "pgd-targeted",
        "projected gradient descent towards the attacker's sentence",
        "Madry et al. 2018, arXiv 1706.06083; Qi et al. 2023, arXiv 2306.13213",
        "white-box",
        "codefend.attacks.pgd:PGD",
        "targeted",
    ),
    _apgd(
        "apgd",
        "auto-PGD against the true answer: adaptive steps and restarts from the best",
        "Croce & Hein 2020, arXiv 2003.01690",
    ),
    _apgd(
        "apgd-targeted",
        "auto-PGD towards the attacker's sentence",
        "Croce & Hein 2020, arXiv 2003.01690; Schlarmann & Hein 2023, arXiv 2308.10741",
        goal="targeted",
    ),
    _apgd(
        "feature",
        "auto-PGD that turns every vision token away from the clean ones",
        "VEAttack, ICLR 2026",
        goal="feature",
    ),
    _apgd(
        "feature-target",
        "auto-PGD that turns the vision tokens towards another image's",
        "AttackVLM (MF-ii), Zhao et al. 2023, arXiv 2305.16934",
        goal="feature-target",
    ),
    AttackSpec(
        "mifgsm",
        "sign steps with momentum, a transfer attack",
        "Dong et al. 2018, arXiv 1710.06081",
        "white-box",
        "codefend.attacks.mifgsm:MIFGSM",
        steps=10,
    ),
    AttackSpec(
        "nifgsm",
        "momentum with a Nesterov look-ahead",
        "Lin et al. 2020, arXiv 1908.06281",
        "white-box",
        "codefend.attacks.mifgsm:MIFGSM",
        steps=10,
        options={"nesterov": True},
    ),
    AttackSpec(
        "dim",
        "momentum over random resizes of the input",
        "Xie et al. 2019, arXiv 1803.06978",
        "white-box",
        "codefend.attacks.mifgsm:MIFGSM",
        steps=10,
        options={"diversity": 0.5},
    ),
    AttackSpec(
        "cw",
        "Adam on the objective and the squared distance, inside the ball",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        "codefend.attacks.cw:CW",
    ),
    AttackSpec(
        "low-frequency",
        "Adam on the lowest cosine frequencies of the perturbation, inside the ball",
        "after DiffBreak, Kassis et al. 2025, arXiv 2411.16598; basis of Guo et al. 2018, arXiv 1809.08758",
        "white-box",
        "codefend.attacks.low_frequency:LowFrequency",
    ),
    AttackSpec(
        "square",
        "random search with squares; scores only",
        "Andriushchenko et al. 2020, arXiv 1912.00049",
        "score",
        "codefend.attacks.square:SquareAttack",
        steps=5000,
    ),
    AttackSpec(
        "rgf",
        "sign steps along finite differences in random directions; scores only",
        "AttackVLM (MF-tt), Zhao et al. 2023, arXiv 2305.16934",
        "score",
        "codefend.contrib.attacks.rgf:RGF",
        steps=800,
    ),
    AttackSpec(
        "spsa",
        "Adam on two-sided random differences; scores only",
        "Uesato et al. 2018, arXiv 1802.05666",
        "score",
        "codefend.contrib.attacks.rgf:SPSA",
        steps=5000,
    ),
    AttackSpec(
        "noise",
        "best of ten uniform draws from the ball: a control",
        "uniform noise",
        "control",
        "codefend.attacks.corruptions:RandomNoise",
        steps=1,
    ),
    _apgd(
        "apgd-margin",
        "auto-PGD on the margins of the true answer's tokens",
        "Croce & Hein 2020, arXiv 2003.01690; f6 of Carlini & Wagner 2017, arXiv 1608.04644",
        goal="margin",
    ),
    _apgd(
        "apgd-margin-targeted",
        "auto-PGD on the margins of the attacker's sentence",
        "Croce & Hein 2020, arXiv 2003.01690; f6 of Carlini & Wagner 2017, arXiv 1608.04644",
        goal="margin-targeted",
    ),
    AttackSpec(
        "cw-margin",
        "Adam on the margins of the true answer's tokens and the squared distance, inside the ball",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        "codefend.attacks.cw:CW",
        "margin",
    ),
    _apgd(
        "mf-it",
        "auto-PGD that turns the vision tokens towards the attacker's sentence",
        "AttackVLM (MF-it), Zhao et al. 2023, arXiv 2305.16934",
        goal="feature-text",
    ),
    _apgd(
        "word-head",
        "auto-PGD that turns every vision token away from its nearest word: fast, and strong on the pocket",
        "Croce & Hein 2020, arXiv 2003.01690, on a pocket's own head (victims.pocket.Pocket.word_scores)",
        goal="feature-words",
    ),
    _apgd(
        "class-head",
        "auto-PGD that turns the class of a photograph into another, on the logits of the pocket's encoder",
        "Croce & Hein 2020, arXiv 2003.01690; logits after Carlini & Wagner 2017, arXiv 1608.04644",
        goal="classes",
    ),
    AttackSpec(
        "ssa-cwa",
        "common weakness attack over simulated spectra, away from the clean tokens; a transfer attack",
        "Dong et al. 2023, arXiv 2309.11751; SSA 2207.05382, CWA 2303.09105",
        "white-box",
        "codefend.attacks.ssa_cwa:SSACWA",
        "feature",
        steps=500,
    ),
    AttackSpec(
        "pureproof",
        "towards another image through a surrogate denoiser at random strengths, to survive purification",
        "PureProof, CVPR 2026 (reconstruction from a description)",
        "white-box",
        "codefend.contrib.attacks.pureproof:PureProof",
        "feature-target",
    ),
    AttackSpec(
        "robustvlm",
        "auto-PGD from the clean image in half precision, then in float32 from the best",
        "Schlarmann & Hein 2023, arXiv 2308.10741",
        "white-box",
        "codefend.contrib.attacks.robustvlm:RobustVLM",
    ),
    AttackSpec(
        "stadv",
        "moves pixels by a smooth flow",
        "Xiao et al. 2018, arXiv 1801.02612",
        "white-box",
        "codefend.attacks.stadv:StAdv",
        bound="flow",
    ),
    AttackSpec(
        "perc-al",
        "steps down the objective and back in colour, inside a CIEDE2000 distance",
        "Zhao, Liu & Larson 2020, arXiv 1911.02466",
        "white-box",
        "codefend.contrib.attacks.perc_al:PerCAL",
        bound="colour",
    ),
    AttackSpec(
        "universal",
        "one perturbation for the whole batch",
        "Moosavi-Dezfooli et al. 2017, arXiv 1610.08401; Shafahi et al. 2020, arXiv 1811.11304",
        "white-box",
        "codefend.contrib.attacks.universal:UniversalPerturbation",
    ),
    AttackSpec(
        "patch",
        "any pixels inside one square at a random place",
        "Brown et al. 2017, arXiv 1712.09665; LaVAN, Karmon et al. 2018, arXiv 1801.02608",
        "white-box",
        "codefend.attacks.patch:AdversarialPatch",
        bound="patch",
    ),
    AttackSpec(
        "patch-targeted",
        "any pixels inside one square, towards the attacker's sentence",
        "Brown et al. 2017, arXiv 1712.09665; LaVAN, Karmon et al. 2018, arXiv 1801.02608",
        "white-box",
        "codefend.attacks.patch:AdversarialPatch",
        "targeted",
        bound="patch",
    ),
    AttackSpec(
        "square-text",
        "random search with squares against the text of the answer; for black boxes",
        "Andriushchenko et al. 2020, arXiv 1912.00049",
        "score",
        "codefend.attacks.square:SquareAttack",
        "answer",
        steps=1000,
    ),
    AttackSpec(
        "mf-tt",
        "random gradient-free steps towards the attacker's sentence in the answer's text",
        "AttackVLM (MF-tt), Zhao et al. 2023, arXiv 2305.16934",
        "score",
        "codefend.contrib.attacks.rgf:RGF",
        "answer-target",
        steps=800,
    ),
    AttackSpec(
        "corruption",
        "the worst of eleven common corruptions at severity 3: a control",
        "Hendrycks & Dietterich 2019, arXiv 1903.12261",
        "control",
        "codefend.attacks.corruptions:Corruption",
        steps=1,
        bound="none",
    ),
    *(
        AttackSpec(
            f"scaling-{kernel}",
            f"hides an image that models see once they have shrunk the attacked one by {kernel}",
            "Xiao et al., USENIX Security 2019; Quiring et al., USENIX Security 2020",
            "score",
            "codefend.attacks.scaling:ScalingAttack",
            "hidden-image",
            steps=1,
            bound="none",
        )
        for kernel in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    ),
)


TEXT_ATTACKS: dict[str, TextAttackSpec] = _by_name(
    TextAttackSpec(
        "characters",
        "typos in the question, by random search",
        "after DeepWordBug, arXiv 1801.04354, and TextBugger, arXiv 1812.05271",
        "score",
        "codefend.attacks.prompt_edits:CharacterEdits",
        changes="prompt",
    ),
    TextAttackSpec(
        "glyphs",
        "letters of the question that only look alike, by random search",
        "after VIPER, Eger et al. 2019, arXiv 1903.11508",
        "score",
        "codefend.attacks.prompt_edits:GlyphEdits",
        changes="prompt",
    ),
    TextAttackSpec(
        "words",
        "small rewordings of the question, by random search",
        "operations of EDA, Wei & Zou 2019, arXiv 1901.11196",
        "score",
        "codefend.attacks.prompt_edits:WordEdits",
        changes="prompt",
    ),
    TextAttackSpec(
        "planted",
        "an instruction planted next to the question",
        "after Perez & Ribeiro 2022, arXiv 2211.09527",
        "score",
        "codefend.attacks.prompt_injection:PlantedInstruction",
        "targeted",
        steps=5,
        changes="prompt",
    ),
    TextAttackSpec(
        "injection",
        "an instruction injected behind the question: plain, behind blank lines, as a new task, or all at once",
        "Liu et al. 2024, arXiv 2310.12815",
        "score",
        "codefend.attacks.prompt_injection:PromptInjection",
        "targeted",
        steps=5,
        changes="prompt",
    ),
    TextAttackSpec(
        "typographic",
        "the attacker's sentence written into the image",
        "Goh et al. 2021 (Multimodal Neurons); FigStep, arXiv 2311.05608",
        "score",
        "codefend.attacks.typographic:TypographicAttack",
        "targeted",
        steps=6,
        changes="image",
    ),
    TextAttackSpec(
        "typographic-faint",
        "the attacker's sentence all over the image in faint, dense or spaced letters that OCR may miss",
        "after Goh et al. 2021 (Multimodal Neurons); against defenses that read",
        "score",
        "codefend.attacks.typographic:FaintTextAttack",
        "targeted",
        steps=16,
        changes="image",
    ),
    TextAttackSpec(
        "joint",
        "typos and auto-PGD in turns",
        "after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655",
        "white-box",
        "codefend.attacks.alternating:AlternatingAttack",
        changes="both",
    ),
    TextAttackSpec(
        "joint-targeted",
        "a planted instruction and auto-PGD in turns, towards the attacker's sentence",
        "after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655",
        "white-box",
        "codefend.attacks.alternating:TargetedAlternatingAttack",
        "targeted",
        changes="both",
    ),
)

_OUTSIDE = (
    ("foolbox-pgd", "projected gradient descent", "foolbox", "PGD"),
    ("foolbox-adam-pgd", "projected gradient descent by Adam", "foolbox", "AdamPGD"),
    ("foolbox-mifgsm", "sign steps with momentum", "foolbox", "MomentumIterativeFastGradientMethod"),
    ("art-pgd", "projected gradient descent", "art", "PGD"),
    ("art-apgd", "auto-PGD", "art", "APGD"),
    ("art-autoattack", "AutoAttack: auto-PGD on two losses, then Square, a third of the steps each", "art", ""),
    ("torchattacks-pgd", "projected gradient descent", "torchattacks", "PGD"),
    ("torchattacks-eotpgd", "projected gradient descent over the defense's noise", "torchattacks", "EOTPGD"),
    ("torchattacks-apgd", "auto-PGD", "torchattacks", "APGD"),
)
_LIBRARIES = {"foolbox": "Foolbox", "art": "Adversarial Robustness Toolbox", "torchattacks": "torchattacks"}
# By the code of other libraries, against the true answer: `contrib.outside`, extra "outside".
OUTSIDE_ATTACKS: dict[str, AttackSpec] = {
    name: AttackSpec(
        name,
        f"by {_LIBRARIES[library]}: {summary}",
        _LIBRARIES[library],
        "white-box",
        "codefend.contrib.outside:OutsideAttack",
        options={"library": library, "algorithm": algorithm},
    )
    for name, summary, library, algorithm in _OUTSIDE
}

EVERY_ATTACK: dict[str, AttackSpec | TextAttackSpec] = {**ATTACKS, **TEXT_ATTACKS, **OUTSIDE_ATTACKS}
