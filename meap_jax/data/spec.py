"""What the data of a run depends on, built once from its config.

`dataclasses.asdict` of a value here is what a manifest holds of it, under "options": prepared folders are compared by
it, and plan folders named. A field that is added or renamed means that prepared data no longer matches.
"""

import dataclasses
from collections.abc import Mapping

import ml_collections

from meap_jax.config import mixture, seed_of


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """How the documents of a source are packed into blocks; fields as in the config."""

    max_tokens: int
    long_from: int
    keep_shorter: float
    packing: str
    seq_len: int
    seed: int

    @property
    def block_len(self) -> int:
        """Ids in a block: what a row predicts is shifted by one."""
        return self.seq_len + 1

    @property
    def separates_documents(self) -> bool:
        """Whether a block can hold several documents that don't see each other, or padding."""
        return self.packing != "concat"


@dataclasses.dataclass(frozen=True)
class ChatPlanSpec(PlanSpec):
    """How samples of conversations are packed, whole; fields as in `sft`."""

    arrangement: str
    longer_than: int
    too_long: str
    loss: str
    packed: bool


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """What rows say of samples, beyond where they are; fields as in `sft` and `objective`."""

    positions: str
    masks: str
    mask_ratio: float
    seed: int  # Of static masks.


@dataclasses.dataclass(frozen=True)
class TextSourceSpec:
    """A source of text: an entry of data.sources, and the share that is held out."""

    kind: str = dataclasses.field(default="text", init=False, repr=False)
    holdout: float
    path: str | None  # None: what is prepared there, wherever it came from.
    validation: str
    field: str
    where: str


@dataclasses.dataclass(frozen=True)
class ChatSourceSpec(TextSourceSpec):
    """A source of conversations; fields as in `sft`. `field` is not read."""

    kind: str = dataclasses.field(default="chat", init=False, repr=False)
    template: str
    system: str | None  # None: the template's own.
    turns: str


@dataclasses.dataclass(frozen=True)
class StdlibSourceSpec:
    """The documentation of the running Python."""

    kind: str = dataclasses.field(default="stdlib", init=False, repr=False)
    holdout: float


@dataclasses.dataclass(frozen=True)
class RetrievalSourceSpec:
    """Generated documents that state facts and ask for them; fields as in data.retrieval."""

    kind: str = dataclasses.field(default="retrieval", init=False, repr=False)
    seed: int
    num_keys: int
    num_values: int
    min_facts: int
    num_facts: int
    questions_per_fact: float
    num_eval_facts: int
    max_fillers: int
    num_documents: int
    num_eval_documents: int


SourceSpec = TextSourceSpec | StdlibSourceSpec | RetrievalSourceSpec


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """All that prepared data depends on, by the names of its sources."""

    tokenizer: str  # data.tokenizer.
    vocab_size: int  # Of the model.
    sources: Mapping[str, SourceSpec]
    plans: Mapping[str, PlanSpec]
    max_skipped: int  # Bad records of a source that are passed over, ...
    max_skipped_share: float  # ... and the share of its records that they may be.
    samples: SampleSpec
    epoch_plans: Mapping[str, PlanSpec] = dataclasses.field(default_factory=dict)  # Whose blocks make an epoch.
    where: str = "all"  # objective.where: what rows say of it isn't prepared, so that it can change over one folder.

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields of `Row` that training needs, such as segment ids where a source's blocks separate documents."""
        arrangements = {plan.arrangement for plan in self.plans.values() if isinstance(plan, ChatPlanSpec)}
        if arrangements:
            [arrangement] = arrangements
            return sample_fields(arrangement, self.samples)
        separates = any(plan.separates_documents for plan in self.plans.values())
        return ("tokens", *["segment_ids"] * separates, *["maskable"] * (self.where != "all"))


def sample_fields(arrangement: str, samples: SampleSpec) -> tuple[str, ...]:
    """The fields of `Row` that rows of samples need."""
    fields: tuple[str, ...] = ("tokens", "segment_ids", "loss_weights")
    if arrangement != "none":
        fields += ("maskable", "is_copy")
    if arrangement == "shared_prefix":
        fields += ("positions", "branch_ids")
    if arrangement == "concat" and samples.positions == "restart":
        fields += ("rope_positions",)
    return fields


def data_spec(config: ml_collections.ConfigDict) -> DataSpec:
    """The data that a config asks for: of the sources in its mixture, in their order."""
    d = config.data
    sources: dict[str, SourceSpec] = {}
    plans: dict[str, PlanSpec] = {}
    for name in mixture(config):
        plan = PlanSpec(0, 0, 1.0, d.packing, config.seq_len, d.seed)
        if name == "retrieval":
            sources[name] = RetrievalSourceSpec(seed=d.seed, **d.retrieval.to_dict())
            plan = dataclasses.replace(plan, packing="best_fit")  # Its documents must not be cut.
        elif name == "stdlib":
            sources[name] = StdlibSourceSpec(d.holdout)
        else:
            s = d.sources[name]
            text = (d.holdout, s.path, s.validation, s.field, s.where)
            sources[name] = TextSourceSpec(*text)
            plan = dataclasses.replace(
                plan, max_tokens=s.max_tokens, long_from=s.long_from, keep_shorter=s.keep_shorter
            )
            if s.format == "chat":
                sft = config.sft
                sources[name] = ChatSourceSpec(*text, sft.template, sft.system, sft.turns)
                whole = dataclasses.asdict(plan) | {"packing": "best_fit"}
                of_samples = {key: sft[key] for key in ("arrangement", "longer_than", "too_long", "loss", "packed")}
                plan = ChatPlanSpec(**whole, **of_samples)
        plans[name] = plan
    sft = config.sft
    samples = SampleSpec(sft.positions, sft.masks, config.objective.mask_ratio, seed_of(config, "mask"))
    epoch_plans: dict[str, PlanSpec] = {}
    if sft.epoch_of != "own":
        chats = {name: plan for name, plan in plans.items() if isinstance(plan, ChatPlanSpec)}
        epoch_plans |= {name: dataclasses.replace(plan, arrangement=sft.epoch_of) for name, plan in chats.items()}
    vocab_size, where = config.model.vocab_size, config.objective.where
    return DataSpec(
        d.tokenizer, vocab_size, sources, plans, d.max_skipped, d.max_skipped_share, samples, epoch_plans, where
    )
