"""The whole configuration: all sections, methods laid over what they extend, and what one key alone cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from laid.errors import LaidError
from laid.settings.base import Place, Section, merge, plain
from laid.settings.data import Data, Haystacks
from laid.settings.family import Family, Models
from laid.settings.measuring import Analysis, Beyond, Evaluation, Pope, Sweep, Tables
from laid.settings.methods import BUILT_IN, AnyMethod, Method, MethodName, TrainedMethod
from laid.settings.running import Plan, Resources
from laid.settings.training import NOT_ASKED, TeacherCache, Training
from laid.settings.tune import Tune, copies, tuned_students, variants

Path = tuple[str, ...]


class Invalid(LaidError):
    """A value that cannot be: the path of its key, and either pydantic's error or a complaint in words.

    model: the class that describes the first keys of the path down to `depth`, for what is allowed there.
    """

    def __init__(self, path: Path, problem: Any, model: type[Section] | None = None, depth: int = 0) -> None:
        super().__init__(f"{'.'.join(path)}: {problem if isinstance(problem, str) else problem['msg']}")
        self.path, self.problem, self.model, self.depth = path, problem, model, depth


class Settings(Section):
    """Every key of config.yaml and its overlays. A key that is left out takes its default."""

    scale: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "small"
    """Name of the scale: results are written below `<results>/<scale>/`."""
    results: Place = "results"
    """Folder of all results, seen from the folder that the command runs in."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Training runs of each trained method, with seeds 0, 1, ... With one, intervals count questions; with several,
    questions and seeds."""
    complete: bool = False
    """For an overlay that describes its scale alone: what it leaves out takes its default, and nothing comes from the
    files before it."""
    data: Data = Data()
    haystacks: Haystacks = Haystacks()
    models: Models = Models()
    evaluation: Evaluation = Evaluation()
    analysis: Analysis = Analysis()
    beyond: Beyond = Beyond()
    tables: Tables = Tables()
    resources: Resources = Resources()
    plan: Plan = Plan()
    family: Family = Family()
    training: Training = Training()
    teacher_cache: TeacherCache = TeacherCache()
    methods: dict[MethodName, AnyMethod] = {}
    """Methods by name: what is done to a student before it is evaluated. base, yarn and self_extend need not be
    written. A method of another name is trained, unless it extends one of these three."""
    pope: Pope = Pope()
    sweep: Sweep = Sweep()
    tune: Tune = Tune()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from what is written in files. Raises Invalid."""
        values = plain(values)
        written = values.get("methods", {})
        if not isinstance(written, dict):
            _checked(cls, {"methods": written})
        written = {**{name: {} for name in BUILT_IN}, **written}
        for name in written:
            _checked(kind(name, written), written[name], ("methods", name))
        methods = {name: extended(name, written) for name in written}
        settings = tried(_checked(cls, values | {"methods": methods}))
        for path, complaint in contradictions(settings):
            raise Invalid(path, complaint)
        return settings

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Validated settings with `values` laid over these, at any depth. Raises Invalid."""
        return self.of(merge(self.model_dump(), values))


def kind(name: str, methods: Mapping[str, Any]) -> type[Method]:
    """The class of a method: that of the root of what it extends. Raises Invalid for a parent that cannot be."""
    chain = [name]
    while True:
        own = methods[chain[-1]]
        parent = own.get("extends") if isinstance(own, dict) else None
        if not isinstance(parent, str):
            return BUILT_IN.get(chain[-1], TrainedMethod)
        at = ("methods", chain[-1], "extends")
        if chain[-1] in BUILT_IN:
            raise Invalid(at, f"{chain[-1]} is built in and extends no other method")
        if parent in chain:
            raise Invalid(at, f"goes in a circle ({' -> '.join((*chain, parent))})")
        if parent not in methods:
            raise Invalid(at, f"no such method; methods: {', '.join(methods)}")
        chain.append(parent)


def extended(name: str, methods: Mapping[str, Any]) -> Method:
    """A method laid over the one it extends, before defaults fill what neither sets. A label is its own method's."""

    def resolved(name: str) -> dict[str, Any]:
        own, parent = methods[name], methods[name].get("extends")
        return own if parent is None else merge({**resolved(parent), "label": None}, own)

    return kind(name, methods).model_validate(resolved(name))


def tried(settings: Settings) -> Settings:
    """What section tune tries among methods and members. Those that are there already stay: settings that were
    resolved before. Raises Invalid for a setting that its method cannot have."""
    methods, family, tune = dict(settings.methods), settings.family, settings.tune
    for name, (method, place) in variants(tune.methods).items():
        if method in settings.methods:
            own, values = settings.methods[method], tune.methods[method][place]
            merged = merge(own.model_dump(), {**values, "extends": method, "label": None})
            found = _checked(type(own), merged, ("tune", "methods", method, str(place)))
            methods.setdefault(name, found)
    members = dict(family.members)
    for student in tune.students or settings.models.students:
        for k, name in enumerate(copies(student, settings) if student in family.members else []):
            members.setdefault(name, members[student].changed({"seed": members[student].seed + k}))
    family = family.model_copy(update={"members": members})
    return settings.model_copy(update={"methods": methods, "family": family})


def contradictions(settings: Settings) -> Iterator[tuple[Path, str]]:
    """(path, complaint) for every pair of values that contradict each other."""
    data, models, methods = settings.data, settings.models, settings.methods
    if data.source == "local" and not data.root:
        yield (
            ("data", "root"),
            "data.source is 'local', so this must name the folder with annotations/ and the images",
        )
    sizes = settings.haystacks.train
    if sizes.min_size > sizes.max_size:
        yield ("haystacks", "train", "min_size"), f"{sizes.min_size} is above max_size {sizes.max_size}"
    asked = settings.training.validation
    if asked and settings.training.parallel == "zero3":
        yield ("training", "validation"), NOT_ASKED
    made = settings.haystacks.validation.sizes
    for size in (asked.sizes or []) if asked else []:
        if size not in made:
            yield (
                ("training", "validation", "sizes"),
                f"{size} is not among haystacks.validation.sizes, {', '.join(map(str, made))}",
            )
    pope = settings.pope
    if pope.wording == "haystack" and pope.objects < 2:
        yield (
            ("pope", "objects"),
            f"{pope.objects}: the wording 'haystack' names a second object of the image, so give at least 2",
        )
    largest = max(settings.haystacks.test.sizes)
    if settings.beyond.table and min(settings.beyond.sizes) <= largest:
        yield (
            ("beyond", "sizes"),
            f"{min(settings.beyond.sizes)} is not above the largest test size, {largest} (haystacks.test.sizes)",
        )
    for key in ("methods", "ablations"):
        first = getattr(settings.tables, key)[:1]
        if first != ["base"]:
            how = f"starts with {first[0]!r}" if first else "is empty"
            yield ("tables", key), f"{how}; base must come first, gains are against it"
    found = variants(settings.tune.methods)
    for path, names, allowed in (
        (("sweep", "students"), settings.sweep.students or [], models.students),
        (("sweep", "against"), settings.sweep.against, list(methods)),
        (("tune", "students"), settings.tune.students or [], models.students),
        (
            ("tune", "methods"),
            list(settings.tune.methods),
            [name for name in methods if name not in ("base", *found)],
        ),
        (("sweep", "methods"), settings.sweep.methods, list(methods)),
        (("tables", "methods"), settings.tables.methods, list(methods)),
        (("tables", "ablations"), settings.tables.ablations, list(methods)),
        (("analysis", "methods"), settings.analysis.methods, list(methods)),
        (("beyond", "methods"), settings.beyond.methods, list(methods)),
        (("pope", "methods"), settings.pope.methods, list(methods)),
    ):
        unknown = [name for name in names if name not in allowed]
        if unknown:
            yield path, f"{unknown[0]!r} is not among {', '.join(allowed) or 'none'}"
    for name in tuned_students(settings) if settings.tune.pretrained > 1 else []:
        if name in models.checkpoints or name not in settings.family.members:
            yield (
                ("tune", "pretrained"),
                f"{settings.tune.pretrained}, but laid does not pretrain {name!r} (models.checkpoints); set it to 1",
            )
    for section in ("analysis", "beyond", "pope"):
        if "base" not in getattr(settings, section).methods:
            yield (section, "methods"), "base is missing: the others are held against it"
    if models.teacher in models.students:
        yield ("models", "students"), f"{models.teacher!r} is the teacher and cannot be a student of itself"


def _checked(model: type[Section], values: Any, at: Path = ()) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: list(map(str, e["loc"])))
        raise Invalid((*at, *map(str, first["loc"])), first, model, len(at)) from None
