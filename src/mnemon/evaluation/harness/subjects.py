"""The 57 subjects of MMLU, and the two ways in which they are grouped."""

_STEM = """
abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics
college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology
high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics high_school_statistics
machine_learning
"""
_HUMANITIES = """
formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions
"""
_SOCIAL_SCIENCES = """
econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
security_studies sociology us_foreign_policy
"""
_OTHERS = """
business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics
miscellaneous nutrition professional_accounting professional_medicine virology
"""

FIELDS: dict[str, tuple[str, ...]] = {
    "STEM": tuple(_STEM.split()),
    "Humanities": tuple(_HUMANITIES.split()),
    "Social Sciences": tuple(_SOCIAL_SCIENCES.split()),
    "Others": tuple(_OTHERS.split()),
}
"""Subjects by field, as the benchmark groups them."""

MMLU_SUBJECTS: tuple[str, ...] = tuple(sorted(subject for names in FIELDS.values() for subject in names))

_PREFIXES = {"High School": "high_school_", "College": "college_", "Professional": "professional_"}

LEVELS: dict[str, tuple[str, ...]] = {
    level: tuple(subject for subject in MMLU_SUBJECTS if subject.startswith(prefix))
    for level, prefix in _PREFIXES.items()
}
LEVELS["General Knowledge"] = tuple(
    subject for subject in MMLU_SUBJECTS if not subject.startswith(tuple(_PREFIXES.values()))
)
"""Subjects by difficulty: those named after a level of education, and the rest. The LM2 paper does not list them."""
