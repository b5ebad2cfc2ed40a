"""Experiments: layering, overrides, and what is refused with which words."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay_config import config
from inlay_config.errors import ConfigError

ALIAS_BOMB = "a: &a [x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in itertools.pairwise("abcdef")
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_packaged_experiment_loads_and_round_trips() -> None:
    assert {"addit", "t2i", "presets/addit"} <= set(config.experiments())
    for name in config.experiments():
        experiment = config.load(name)
        assert config.from_dict(json.loads(json.dumps(config.to_dict(experiment)))) == experiment


def test_a_child_extends_appends_and_drops(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "steps: 10\nplugins: {a: {x: 1, y: 2}, b: {}, c: {}}\n")
    child = write(
        tmp_path, "child.yaml", "extends: base.yaml\nplugins: {d: {}, b: null, a: {x: 3}}\n"
    )
    experiment = config.load(child, ["seed=7"])
    assert list(experiment.plugins.items()) == [("a", {"x": 3, "y": 2}), ("c", {}), ("d", {})]
    assert (experiment.steps, experiment.seed) == (10, 7)


def test_a_cycle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        config.load(path)


def test_a_preset_expands_where_it_stands_and_takes_options() -> None:
    plugins = config.expand_presets(
        {"first": {}, "addit": {"latent_blend": None, "subject_mask": {"a": 1}}}
    )
    assert next(iter(plugins)) == "first" and "latent_blend" not in plugins
    assert plugins["subject_mask"]["a"] == 1
    assert plugins["subject_mask"]["subject"] == ""
    named = config.from_dict({"subject": "dog", "plugins": {"addit": {}}})
    assert named.plugins["subject_mask"]["subject"] == "dog"
    assert list(config.load("addit").plugins) == list(config.expand_presets({"addit": {}}))
    beside = config.from_dict({"plugins": {"paste_back": {}, "addit": {}, "pag": {}}})
    assert [*beside.plugins][:2] == ["paste_back", "source_trajectory"]
    assert [*beside.plugins][-1] == "pag"
    with pytest.raises(ConfigError, match="'subject_mask' is listed twice"):
        config.expand_presets({"subject_mask": {}, "addit": {}})


def test_null_drops_only_what_is_listed(tmp_path: Path) -> None:
    assert "latent_blend" not in config.load("addit", ["plugins.latent_blend=null"]).plugins
    with pytest.raises(ConfigError, match=r"plugins\.blend: null drops a plugin"):
        config.load("t2i", ["plugins.blend=null"])


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_prompt_overrides_are_taken_as_they_are_typed(text: str) -> None:
    if "${" not in text:
        assert config.load("t2i", [f"prompt.edit={text}"]).prompt.edit == text


def test_override_values_are_yaml() -> None:
    overrides = [
        "guidance={edit: 3.5, source: 1}",
        "size=[64, 96]",
        "subject=yes",
        "input.image=null",
    ]
    experiment = config.load("t2i", overrides)
    assert experiment.guidance == {"edit": 3.5, "source": 1} and experiment.size == [64, 96]
    assert experiment.subject == "yes" and experiment.input.image is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt.edti=a dog", r"prompt\.edti: unknown key. Did you mean 'edit'"),
        ("stps=3", "stps: unknown key. Did you mean 'steps'"),
        ("steps=0", "steps: 0 cannot be used"),
        ("steps=2.5", "steps: Value '2.5' of type 'float' could not be converted to Integer"),
        ("steps=true", "steps: Value 'True'"),
        ("steps=[1", "steps: .* is not a YAML value"),
        ("n=0", "n: 0 cannot be used"),
        ("seed=-1", "seed: -1 cannot be used"),
        ("guidance=.nan", "guidance: nan is not a finite number"),
        ("guidance=nan", "guidance: 'nan' cannot be used"),
        ("guidance={edit: .inf}", r"guidance\.edit: inf is not a finite number"),
        ("true_cfg=-1", "true_cfg: -1.0 cannot be used"),
        ("size=0", "size: 0 cannot be used"),
        ("size=[64]", r"size: \[64\] cannot be used"),
        ("size=[64, 64, 64]", "size: .* cannot be used"),
        ("device=gpu", "device: 'gpu' cannot be used"),
        ("dtype=fp16", "dtype: 'fp16' cannot be used. It must be float32, float16, bfloat16"),
        ("offload=disk", "offload: 'disk' cannot be used"),
        ("prompt=a dog", "prompt: must be a mapping"),
        ("plugins=[addit]", "plugins: must be a mapping"),
        ("plugins.blend=3", r"plugins\.blend: 3 is no mapping of options"),
        ("plugins.blend.gamma=.nan", r"plugins\.blend\.gamma: nan is not a finite number"),
        ("extends=addit", "extends: unknown key"),
        ("subject=${nothing}", "subject: Interpolation key 'nothing' not found"),
        ("nonsense", "'nonsense' is not an override"),
        ("a..b=1", "'a..b=1' is not an override"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load("t2i", [override])


def test_a_wrong_key_names_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "prompt: {edt: a dog}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: prompt\.edt: unknown key"):
        config.load(path)
    path = write(tmp_path, "mine.yaml", "prompt: {edit: no}\n")
    with pytest.raises(ConfigError, match=r"prompt\.edit: False is not text\. Quote it"):
        config.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1\n", "cannot be read"),
        ("- a\n- b\n", "not a mapping"),
        ("just words\n", "just words: unknown key"),
        (ALIAS_BOMB, "expansion exceeds"),
        ("plugins: !!python/object/apply:os.system ['true']\n", "cannot be read"),
        ("plugins: {a: {_target_: os.system}}\n", r"plugins\.a\._target_: this could run code"),
        ("subject: ${oc.env:HOME}\n", "subject: this could run code"),
        ("subject: ${${subject}:HOME}\n", "subject: this could run code"),
        ("[" * 1100, "cannot be read"),
        ("# " + "x" * (1 << 20), "more than 1 MiB"),
    ],
)
def test_hostile_or_broken_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(write(tmp_path, "x.yaml", text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00subject")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(path)


@pytest.mark.parametrize("name", ["adit", "../../etc/passwd", "missing.yaml", "presets", ""])
def test_an_unknown_experiment_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no experiment"):
        config.load(name)


def test_plain_references_are_followed() -> None:
    experiment = config.load("t2i", ["subject=${prompt.edit}"])
    assert experiment.subject == experiment.prompt.edit != ""


class Blend:
    @dataclass
    class Config:
        steps: list[int] = field(default_factory=lambda: [5])
        weight: float = 0.5
        mode: str = "fixed"


def test_plugin_options_are_typed() -> None:
    options = {"weight": 1, "use": "blend", "steps": [1, 2]}
    parsed = config.parse_plugin_config(Blend, options, "plugins.b")
    assert parsed == Blend.Config(steps=[1, 2], weight=1.0)
    assert config.parse_plugin_config(Blend, None, "plugins.b") == Blend.Config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wieght": 1}, r"plugins\.b\.wieght: unknown key. Did you mean 'weight'"),
        ({"weight": "much"}, r"plugins\.b\.weight: Value 'much'"),
        ({"weight": "nan"}, r"plugins\.b\.weight: nan is not a finite number"),
        ({"steps": [1, "x"]}, r"plugins\.b\.steps\[1\]: Value 'x'"),
        ({"mode": "${oc.env:HOME}"}, r"plugins\.b\.mode: this could run code"),
    ],
)
def test_wrong_plugin_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse_plugin_config(Blend, options, "plugins.b")
