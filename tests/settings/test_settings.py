"""The configuration: defaults, overlays, messages, and which values concern which step."""

import copy
import json
import pickle
import typing
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.cli import main
from laid.errors import LaidError
from laid.settings import (
    SLICES,
    Base,
    Section,
    SelfExtend,
    Settings,
    TrainedMethod,
    Yarn,
    json_schema,
    load,
    merge,
    resolved_file,
    slice_for,
    slice_json,
    validate,
)
from laid.settings.loading import look_at

TOP = Path(__file__).resolve().parents[2]
BASE = TOP / "config.yaml"
SWEEP, TUNE, SHOWN = (
    TOP / f"configs/{name}.yaml" for name in ("sweep", "tune", "readme")
)  # overlays of any scale, the others make one
OVERLAYS = sorted(set((TOP / "configs").glob("*.yaml")) - {SWEEP, TUNE, SHOWN})


def sections(model=Settings):
    """Every class of the settings' tree."""
    yield model
    for field in model.model_fields.values():
        for kind in {field.annotation, *typing.get_args(field.annotation)}:
            for inner in {kind, *typing.get_args(kind)}:
                if isinstance(inner, type) and issubclass(inner, Section):
                    yield from sections(inner)


def nested(key, value):
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def write(folder, text, name="overlay.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(*paths):
    with pytest.raises(LaidError) as caught:
        load(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_schema_is_one_and_agrees_on_what_ships():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    for file in (BASE, *OVERLAYS, SWEEP, TUNE, SHOWN):
        checker.validate(yaml.safe_load(file.read_text()))
        checker.validate(load([BASE, file]).model_dump())
    assert not checker.is_valid({"seeds": 0}) and not checker.is_valid({"sead": 1})
    assert not checker.is_valid({"tables": {"omit": [2, 2]}})


def test_the_document_of_every_key_is_what_the_classes_say(capsys):
    """If not: laid config --docs > docs/reference/settings.md."""
    assert main(["config", "--docs"]) == 0
    assert (TOP / "docs/reference/settings.md").read_text() == capsys.readouterr().out


def test_the_schema_is_printed(capsys):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_every_key_is_described_and_has_a_default():
    found = set(sections())
    assert len(found) > 30
    for model in found:
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            described = field.description or getattr(field.annotation, "__doc__", None)
            assert described and not field.is_required(), f"{model.__name__}.{name}"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_overlays_load_and_name_their_scale(overlay):
    assert load([BASE, overlay]).scale == overlay.stem


def test_the_paper_inherits_no_value_of_the_small_scale(tmp_path):
    """Whatever lies below it, even nothing; and what it gives the baselines is what their authors or the paper say."""
    paper, alone = load([BASE, TOP / "configs/paper.yaml"]), load([TOP / "configs/paper.yaml"])
    other = write(
        tmp_path,
        "training: {weight_decay: 0.5}\nmethods: {yarn: {axes: time}, mine: {extends: sft}, sft: {}}\n",
    )
    assert paper == alone == load([BASE, other, TOP / "configs/paper.yaml"])
    methods, training = paper.methods, paper.training
    assert (training.lr, methods["sft"].lr or training.lr, methods["sft"].lora.rank) == (1e-5, 1e-5, 8)
    assert (methods["yarn"].factor, methods["yarn"].original_positions) == (4.0, 32768)
    assert (methods["self_extend"].group, methods["self_extend"].window) == (4, 1024)
    over = write(tmp_path, "seeds: 3\n", "over.yaml")  # what comes after it still counts
    assert load([BASE, TOP / "configs/paper.yaml", over]) == paper.changed({"seeds": 3})
    assert load([BASE, TOP / "configs/paper.yaml"], {"seeds": "3"}) == paper.changed({"seeds": 3})


def test_a_complete_overlay_alone_is_to_blame(tmp_path):
    over = write(tmp_path, "complete: true\nscale: x\ndata: {source: local}\n")
    assert f"{over}, line 3: data.root: " in complaint(BASE, over)


def test_overlay_merges_deeply_and_replaces_lists(tmp_path):
    over = write(tmp_path, "haystacks: {test: {sizes: [1, 5]}}\nseeds: 3\n")
    merged, base = load([BASE, over]), load([BASE])
    assert merged.haystacks.test == base.haystacks.test.changed({"sizes": [1, 5]})
    assert merged.haystacks.train == base.haystacks.train and merged.seeds == 3


def test_empty_overlay_changes_nothing(tmp_path):
    assert load([BASE, write(tmp_path, "# nothing\n")]) == load([BASE])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("haystack: {}\n", ["overlay.yaml, line 1: haystack: unknown key", "did you mean 'haystacks'?"]),
        ("\nhaystacks:\n  sead: 1\n", ["line 3: haystacks.sead: unknown key", "'seed'", "hard_negatives"]),
        (
            "data: {source: lokal}\n",
            ["data.source = 'lokal'", "'rendered', 'local', 'download'", "did you mean 'local'"],
        ),
        ("seeds: 0\n", ["seeds = 0: must be at least 1"]),
        ("seeds: two\n", ["seeds = 'two': expected a whole number, found a text"]),
        ("seeds: true\n", ["seeds = true: expected a whole number, found true or false"]),
        ("haystacks: {hard_negatives: 1.5}\n", ["haystacks.hard_negatives = 1.5: must be at most 1"]),
        ("haystacks: {test: {sizes: [1, -2]}}\n", ["haystacks.test.sizes.1 = -2: must be at least 1"]),
        ("haystacks: {test: {sizes: [5, 5]}}\n", ["haystacks.test.sizes = [5, 5]: an entry is there twice"]),
        (
            "methods: {sft: {label: 'a $_{'}}\n",
            ["methods.sft.label = 'a $_{': tables and figures print a label as it is: no $"],
        ),
        ("haystacks: {test: {sizes: []}}\n", ["needs at least 1 entry, has 0"]),
        ("haystacks: 7\n", ["haystacks = 7: expected a mapping, found a whole number"]),
        ("haystacks:\n", ["haystacks = null: expected a mapping, found null"]),
        ("scale: ../elsewhere\n", ["scale = '../elsewhere': must match"]),
        ("data: {source: local}\n", ["data.root: data.source is 'local'"]),
        (
            "haystacks: {train: {min_size: 30}}\n",
            ["line 1: haystacks.train.min_size: 30 is above max_size 20"],
        ),
        ("models: {students: [teacher]}\n", ["models.students: 'teacher' is the teacher"]),
        ("seeds: 1\nseeds: 2\n", ["overlay.yaml: line 2: key 'seeds' stands here and on line 1"]),
        ("- 1\n- 2\n", ["expected `key: value` lines at the top, found a list"]),
        ("a: [1\n", ["not valid YAML, line"]),
        ("a: !!python/object/apply:os.system [echo]\n", ["line 1: a value of the kind !!python/object"]),
    ],
)
def test_wrong_input_gets_one_clear_line(tmp_path, text, parts):
    said = complaint(BASE, write(tmp_path, text))
    for part in parts:
        assert part in said


def test_missing_and_unreadable_files(tmp_path):
    assert "no such configuration file" in complaint(BASE, tmp_path / "absent.yaml")
    assert "is a folder" in complaint(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"scale: caf\xe9\n")
    assert "not UTF-8" in complaint(tmp_path / "latin.yaml")
    assert "no configuration file" in complaint()


def test_a_value_from_the_command_line_is_not_blamed_on_a_file():
    values = load([BASE]).model_dump() | {"seeds": -1}
    with pytest.raises(LaidError, match="^command line: seeds = -1: must be at least 1"):
        validate(values, [BASE])


# ------------------------------------------------------------------ slices


def test_slices_name_keys_that_exist():
    """A misspelt entry would silently make a step blind to a value."""
    full = load([BASE]).model_dump()
    for step, entries in SLICES.items():
        for entry in entries:
            found = [full]
            for key in entry.strip("-?").format(member="small", method="laid").split("."):
                found = [v for part in found for name, v in part.items() if key in (name, "*")]
                assert found, f"{step}: {entry}"


def wildcards_for(step, full):
    member = full.models.students[0]
    return {"member": member, "student": member, "method": "laid", "seed": 0, "size": 5}


@pytest.mark.parametrize(
    ("step", "key", "value", "matters"),
    [
        ("data", "data.rendered.seed", 1, True),
        ("data", "haystacks.seed", 1, False),
        ("haystacks", "haystacks.test.questions", 10, True),
        ("haystacks", "seeds", 3, False),
        ("train", "training.lr", 0.25, True),
        ("train", "methods.laid.lambda_laid", 0.25, True),
        ("train", "methods.sft.lr", 0.25, False),
        ("train", "training.checkpoint_minutes", 99, False),
        ("train", "evaluation.attention", "eager", True),
        ("evaluate", "evaluation.scoring", "generate", True),
        ("evaluate", "evaluation.feature_cache_gb", 1, False),
        ("evaluate", "evaluation.shard", "cell", False),
        ("evaluate", "resources.evaluate.mem_mb", 999, False),
        ("train", "methods.laid.label", "ours", False),
        ("tables", "tables.threshold", 0.5, True),
        ("tables", "methods.laid.label", "ours", True),
        ("tables", "methods.laid.lr", 0.5, False),
        ("tables", "results", "elsewhere", False),
    ],
)
def test_slice_changes_exactly_when_a_value_matters(step, key, value, matters):
    full = load([BASE])
    changed = full.changed(nested(key, value))
    wildcards = wildcards_for(step, full)
    before, after = (slice_json(step, c, **wildcards) for c in (full, changed))
    assert (before != after) is matters


def test_slice_of_an_unknown_step():
    with pytest.raises(LaidError, match="no step 'trian'; steps: data"):
        slice_for("trian", {})


def test_slice_takes_away_and_adds_one_member(monkeypatch):
    monkeypatch.setitem(SLICES, "demo", ["a", "-a.members", "a.members.{member}", "b.{member}.x"])
    full = {"a": {"k": 1, "members": {"s": {"w": 1}, "t": {"w": 2}}}, "b": {"s": {"x": 0, "y": 1}}, "c": 3}
    untouched = copy.deepcopy(full)
    assert slice_for("demo", full, member="s") == {
        "a": {"k": 1, "members": {"s": {"w": 1}}},
        "b": {"s": {"x": 0}},
    }
    assert full == untouched


# ------------------------------------------------------------------ merging, as a property

plain = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abcd"), plain, max_size=4)


@settings(max_examples=50, deadline=None)
@given(mappings, mappings)
def test_merge_keeps_both_and_lets_the_overlay_win(base, over):
    before = copy.deepcopy((base, over))
    merged = merge(base, over)
    assert (base, over) == before
    assert merged.keys() == base.keys() | over.keys()
    assert merge(merged, over) == merged and merge(base, {}) == base
    for key in merged:
        if key not in over:
            assert merged[key] == base[key]
        elif not (isinstance(over[key], dict) and isinstance(base.get(key), dict)):
            assert merged[key] == over[key]


# ------------------------------------------------------------------ the resolved file and the verb


def test_resolved_file_is_named_by_content_and_loads_to_the_same(tmp_path):
    full = load([BASE])
    path = resolved_file(full, tmp_path / "x")
    assert load([path]) == full
    stamp = path.stat().st_mtime_ns
    assert resolved_file(validate(dict(reversed(full.model_dump().items()))), tmp_path / "x") == path
    assert path.stat().st_mtime_ns == stamp
    assert resolved_file(full.changed({"seeds": 2}), tmp_path / "x") != path


def test_config_verb_prints_what_load_gives(capsys, tmp_path):
    over = write(tmp_path, "seeds: 4\n")
    assert main(["config", "--json", "--config", str(BASE), str(over)]) == 0
    assert json.loads(capsys.readouterr().out) == load([BASE, over]).model_dump()
    assert main(["config", "--config", str(BASE), str(over)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == load([BASE, over]).model_dump()
    assert main(["config", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("laid config: error: ")


@pytest.mark.parametrize("name", [path.name for path in [*OVERLAYS, SWEEP, TUNE]])
def test_one_file_can_stand_for_base_and_overlay(name, tmp_path):
    """What dvc.yaml asks for at another scale: config.yaml becomes the whole of it, over the file it was read from."""
    own = write(tmp_path, BASE.read_text(), "config.yaml")
    assert main(["config", "--config", str(own), str(TOP / "configs" / name), "--out", str(own)]) == 0
    assert load([own]) == load([BASE, TOP / "configs" / name])
    # What extends another method still follows it.
    other = load([own, write(tmp_path, "methods: {laid_plus: {temperature: 0.7}}\n")])
    assert other.methods["laid_plus_wo_kl"].temperature == 0.7


def test_a_configuration_redirected_onto_itself_is_said(capsys, tmp_path):
    own = write(tmp_path, "", "config.yaml")
    assert main(["config", "--config", str(own), str(TOP / "configs/ci.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"laid config: error: {own}: is empty;") and f"--out {own}" in said
    assert said.count("\n") == 1


def test_methods_of_the_sweep_are_methods_like_others():
    """In the order written, inheriting at any depth; validating the resolved settings again changes nothing."""
    full = load([BASE, SWEEP])
    written = yaml.safe_load(SWEEP.read_text())
    assert [name for name in full.methods if name in written["methods"]] == list(written["methods"])
    swept = [name for name in written["methods"] if name not in full.sweep.against]
    assert [name for name in full.sweep.methods if name in written["methods"]] == swept
    alone, tokens = full.methods["alignment"], full.methods["alignment_distance"]
    assert tokens == alone.changed({"extends": "alignment", "distance": {"strength": 4.0}})
    whole = full.methods["laid_plus"]
    assert full.methods["uniform_gaps"] == whole.changed(
        {"extends": "laid_plus", "gaps": {"draw": "uniform"}}
    )
    assert full.methods["laid_plus_wo_gaps"].gaps.reach == 0 and full.methods["teacher_alone"].lambda_sft == 0
    assert validate(full.model_dump()) == full
    assert slice_for("train", full, method="gain")["methods"].keys() == {"gain"}


def test_settings_that_are_tried_become_methods_and_members(tmp_path):
    """Each laid over its method under a name of its values, each further student the same with the next seed; no job
    of what was there before depends on them, and validating the resolved settings again changes nothing."""
    text = """
family: {members: {small: {seed: 4}}}
tune:
  students: [small]
  pretrained: 3
  methods:
    sft: [{lr: 1e-5, lora: null}, {lora: {rank: 4}, epochs: 0.5}]
    laid: [{alignment: {pairs: [[0, -1]], norm: frobenius}, gain: false}]
    yarn: [{factor: 1.25, axes: time}]
sweep: {seeds: 1}
"""
    base, full = load([BASE]), load([BASE, write(tmp_path, text)])
    names = [
        "sft_lr1em05_lora_null",
        "sft_lora_rank4_epochs0p5",
        "laid_alignment_pairs_0_m1_norm_frobenius_gain_false",
        "yarn_factor1p25_axes_time",
    ]
    assert list(full.methods) == [*base.methods, *names]
    assert full.methods[names[0]] == full.methods["sft"].changed({"extends": "sft", "lr": 1e-5, "lora": None})
    low = full.methods["sft"].changed({"extends": "sft", "lora": {"rank": 4}, "epochs": 0.5})
    assert full.methods[names[1]] == low
    assert full.methods[names[3]] == Yarn(extends="yarn", factor=1.25, axes="time")
    members = full.family.members
    assert members.keys() - base.family.members.keys() == {"small_1", "small_2"}
    assert members["small_2"] == members["small"].changed({"seed": 6})
    assert validate(full.model_dump()) == full
    for step in ("train", "evaluate", "analyse", "why", "tables", "haystacks", "teacher_cache"):
        ways = {"method": "sft", "student": "medium"}
        assert slice_json(step, base, **ways) == slice_json(step, full, **ways), step
    assert slice_json("pretrain", base, member="medium") == slice_json("pretrain", full, member="medium")
    assert slice_for("train", full, method=names[0])["methods"].keys() == {names[0]}


def test_the_grid_that_ships_tries_every_method_of_the_tables():
    full = load([BASE, TUNE])
    assert set(full.tune.methods) == set(full.tables.methods) - {"base"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: {sftt: [{lr: 1}]}", "line 1: tune.methods: 'sftt' is not among yarn, self_extend, sft"),
        ("methods: {sft: [{lr: 1}, {lr: -1}]}", "line 1: tune.methods.sft.1.lr = -1: must be greater than 0"),
        ("methods: {sft: [{epoch: 3}]}", "tune.methods.sft.0.epoch: unknown key; did you mean 'epochs'?"),
        (
            "methods: {sft: [{lora: {rnk: 2}}]}",
            "tune.methods.sft.0.lora.rnk: unknown key; did you mean 'rank'?",
        ),
        ("methods: {sft: {lr: [1]}}", 'tune.methods.sft = {"lr": [1]}: expected a list, found a mapping'),
        ("methods: {sft: [{}]}", "tune.methods.sft.0 = {}: needs at least 1 entry, has 0"),
        ("methods: {sft: [{lr: 1}, {lr: 1}]}", "an entry is there twice"),
        ("methods: {yarn: [{lr: 1}]}", "tune.methods.yarn.0.lr: unknown key; keys in"),
        ("students: [teacher]", "tune.students: 'teacher' is not among medium, small"),
    ],
)
def test_mistakes_in_what_is_tried(tmp_path, text, said):
    assert said in complaint(BASE, write(tmp_path, f"tune: {{{text}}}\n"))


def test_published_students_are_not_pretrained_again(tmp_path):
    said = "tune.pretrained: 2, but laid does not pretrain 'qwen7b' (models.checkpoints); set it to 1"
    assert said in complaint(
        BASE, TOP / "configs/paper.yaml", TUNE, write(tmp_path, "tune: {pretrained: 2}\n")
    )


def test_a_method_of_ones_own(tmp_path):
    """Of the kind of what it extends, in a table by being named there; only its own runs depend on it."""
    text = """
methods:
  mine: {extends: laid, lambda_kl: 0.1, label: Mine}
  mine_2: {extends: mine, gaps: {reach: 64}}
  yarn_4: {extends: yarn, factor: 4}
  plain: {}
tables: {methods: [base, yarn_4, laid, mine], ablations: [base, mine_2]}
"""
    base, full = load([BASE]), load([BASE, write(tmp_path, text)])
    mine, laid = full.methods["mine"], full.methods["laid"]
    assert mine == laid.changed({"extends": "laid", "lambda_kl": 0.1, "label": "Mine"})
    assert full.methods["mine_2"].gaps == laid.gaps.changed({"reach": 64})
    assert full.methods["mine_2"].lambda_kl == 0.1
    assert full.methods["yarn_4"] == Yarn(extends="yarn", factor=4.0)
    kinds = {name: type(full.methods[name]) for name in ("base", "self_extend", "plain", "mine_2")}
    assert kinds == {"base": Base, "self_extend": SelfExtend, "plain": TrainedMethod, "mine_2": TrainedMethod}
    for name in base.methods:
        assert slice_json("train", base, method=name) == slice_json("train", full, method=name)
    assert slice_json("train", full, method="mine") != slice_json("train", full, method="laid")
    assert validate(full.model_dump()) == full


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "methods: {mine: {extends: laidd}}",
            "line 1: methods.mine.extends = 'laidd': no such method; methods: base,",
        ),
        (
            "methods: {mine: {lambda_kll: 1}}",
            "methods.mine.lambda_kll: unknown key; did you mean 'lambda_kl'?",
        ),
        ("methods: {mine: {extends: yarn, lambda_kl: 1}}", "methods.mine.lambda_kl: unknown key; keys in"),
        (
            "methods: {a: {extends: b}, b: {extends: a}}",
            "methods.b.extends = 'a': goes in a circle (a -> b -> a)",
        ),
        ("methods: {yarn: {extends: laid}}", "methods.yarn.extends = 'laid': yarn is built in"),
        ("methods: {My-own: {}}", "'My-own': must match"),
        ("methods: [mine]", 'methods = ["mine"]: expected a mapping, found a list'),
        ("methods: {mine: 3}", "methods.mine = 3: expected a mapping, found a whole number"),
        ("tables: {methods: [base, lade]}", "tables.methods: 'lade' is not among base, yarn"),
        ("analysis: {methods: [lade]}", "analysis.methods: 'lade' is not among base, yarn"),
        ("sweep: {methods: [mine]}", "sweep.methods: 'mine' is not among base, yarn"),
        ("sweep: {against: [mine]}", "sweep.against: 'mine' is not among base, yarn"),
        ("sweep: {students: [teacher]}", "sweep.students: 'teacher' is not among medium, small"),
        (
            "tables: {methods: [laid, base]}",
            "line 1: tables.methods: starts with 'laid'; base must come first",
        ),
        ("tables: {ablations: []}", "tables.ablations"),
        ("tables: {table3_student: small}", "tables.table3_student = 'small': allowed: 'first', 'last'"),
        ("pope: {methods: [sft]}", "line 1: pope.methods: base is missing"),
        ("haystacks: {validation: {sizes: []}}", "haystacks.validation.sizes"),
        ("beyond: {sizes: [150, 200]}", "beyond.sizes: 150 is not above the largest test size, 150"),
    ],
)
def test_mistakes_in_methods_and_their_names(tmp_path, text, said):
    assert said in complaint(BASE, write(tmp_path, text + "\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1: 2", "overlay.yaml: line 1: key 1: a key must be a name"),
        ("? [a, b]\n: 1", "line 1: key a list or mapping: a key must be a name"),
        ("seeds: !!int foo", "line 1: foo: no whole number"),
        ("seeds: !!binary aGk=", "line 1: a value of the kind !!binary: allowed are numbers,"),
        ("seeds: " + "9" * 5000, "no whole number that fits 64 bits"),
        ("training: {lr: .nan}", "line 1: training.lr = .nan: must be a finite number"),
        ('results: "a\\0b"', "line 1: 'a\\x00b' holds a character that no name has"),
        ('results: "\\ud800"', "line 1: '\\ud800' holds a character that no name has"),
        ("family: {members: {../x: {}}}", "family.members: '../x': must match"),
        ("training: {lr: .inf}", "line 1: training.lr = .inf: must be a finite number"),
        ("scale: 2024-13-45x!", "line 1: scale = '2024-13-45x!': must match"),
        ("a: " * 60 + "1", "line 1"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than 40 levels deep"),
        ("a: &a [*a]", "line 1: nested more than 40 levels deep"),
        ('"a\\nb": 1', "line 1: 'a\\nb' holds a character that no name has"),
        (
            "a0: &a0 [1,1,1,1,1,1,1,1]\n"
            + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]\n" for k in range(1, 9)),
            "its aliases stand for more than 100,000 values",
        ),
    ],
)
def test_what_yaml_can_say_and_settings_cannot(tmp_path, text, said):
    assert said in complaint(BASE, write(tmp_path, text + "\n"))


@pytest.mark.parametrize("words", [["-n", "--configfile", "x.yaml"], ["--configfile=x.yaml"], ["-n"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: !!int foo", "line 1: foo: no whole number"),
        ("results: 2024-13-45", "Snakemake cannot read it: month must be in 1..12: put that value in quotes"),
        ("a: =", "Snakemake cannot read it: could not determine a constructor"),
        ("a: 0b_", "Snakemake cannot read it: invalid literal for int"),
        ("__use_yte__: true", "__use_yte__: Snakemake would run what stands in this file"),
        ("seeds: 1", None),
    ],
)
def test_what_snakemake_would_stumble_over_is_said_before_it_reads(tmp_path, monkeypatch, words, text, said):
    """profiles/default/config.yaml calls it with the words of `snakemake`, which reads config.yaml anyway."""
    monkeypatch.chdir(tmp_path)
    file = "x.yaml" if len(words) != 1 or "=" in words[0] else "config.yaml"
    Path(file).write_text(text)
    if said is None:
        assert look_at(words) is None
        return
    with pytest.raises(SystemExit) as caught:
        look_at(words)
    assert caught.value.code.startswith(f"snakemake: error: {file}: {said}") and "\n" not in caught.value.code


def test_numbers_and_dates_are_read_as_they_look(tmp_path):
    full = load(
        [BASE, write(tmp_path, "training: {lr: 1e-4, lr_gain: 2.5E+1, epochs: 3}\nresults: 2024-01-01\n")]
    )
    assert (full.training.lr, full.training.lr_gain, full.results) == (1e-4, 25.0, "2024-01-01")
    assert isinstance(full.training.epochs, float)


def test_the_command_line_comes_last_and_is_read_as_a_file_is(tmp_path):
    """Snakemake hands on what stands in braces as text."""
    over = write(tmp_path, "training: {lr: 2e-4}\nseeds: 2\n")
    given = {"training": {"lr": "1e-4", "train_vision": "true"}, "models": {"students": ["small"]}}
    full = load([BASE, over], given)
    assert (full.training.lr, full.training.train_vision, full.seeds) == (1e-4, True, 2)
    assert full.models.students == ["small"]
    for given, said in (
        ({"training": {"lr": "-1e-4"}}, "command line: training.lr = -0.0001: must be greater than 0"),
        ({"training": {"lrr": "1"}}, "command line: training.lrr: unknown key; did you mean 'lr'?"),
        ({"training": {"lr": ".nan"}}, "command line: training.lr = .nan: must be a finite number"),
        ({"training": {"lr": "1e999"}}, "command line: training.lr = .inf: must be a finite number"),
        ({"results": "a\0b"}, "command line: results = 'a\\x00b': holds a character that no name has"),
        ({"seeds": "many"}, "command line: seeds = 'many': expected a whole number"),
    ):
        with pytest.raises(LaidError) as caught:
            load([BASE, over], given)
        assert str(caught.value).startswith(said)


def test_settings_are_frozen_and_travel(tmp_path):
    full = load([BASE])
    assert pickle.loads(pickle.dumps(full)) == copy.deepcopy(full) == full
    with pytest.raises(ValueError, match="frozen"):
        full.seeds = 2
    with pytest.raises(LaidError, match="seeds"):
        full.changed({"seeds": 0})
