"""Whether the subject is there: the plugin that says so, and the ladder that tries again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import folders
import inlay
from inlay import ConfigError, Stopped
from inlay.cli import experiment
from inlay.cli.ladder import climb, rungs
from inlay_config import config
from inlay_plugins.clips import Clip
from inlay_plugins.presence import Presence
from models import conds, flux

PROMPT = {"source": "a road", "edit": "a dog on a road"}


class Seen:
    """A Grounding-DINO that is as sure of a box as pictures are bright."""

    def surest(self, picture: Tensor, words: str, threshold: float):
        score = float(picture.mean())
        return (score, [0.0, 0.0, 1.0, 1.0]) if words == "dog" and score > threshold else None


def bright(sign: float) -> Clip:
    """A CLIP whose pictures point to one axis, the edit's text to it (or away), the source's to the
    other axis."""
    axis = torch.eye(2)
    read = {PROMPT["edit"]: sign * axis[0], PROMPT["source"]: axis[1]}
    return Clip(
        name="bright",
        side=8,
        mean=torch.zeros(1, 3, 1, 1),
        deviation=torch.ones(1, 3, 1, 1),
        see=lambda pictures: axis[:1].expand(len(pictures), 2),
        read=lambda sentences: torch.stack([read[s] for s in sentences]),
    )


def run(plugin, steps=4, n=2, callback=None):
    session = inlay.Session(flux(), {"presence": plugin})
    return session.run(PROMPT, conds=conds(), steps=steps, n=n, size=32, callback=callback)


def test_a_picture_is_scored_by_the_two_prompts_and_the_manifest_says_so():
    for sign in (1.0, -1.0):
        result = run(Presence(Presence.Config(), loaded=bright(sign)))
        assert result.board["presence:scores"].tolist() == [sign, sign]
        told = {"scores": [sign, sign], "present": sign > 0, "best": 0}
        assert result.record["presence"] == told


def test_the_best_shows_the_subject_and_fits_the_whole_prompt():
    """By (cosine to prompt.edit, to prompt.source): the first lost the source, the last lacks the
    subject."""
    seen = F.normalize(torch.tensor([[0.5, 0.0, 0.8], [0.6, 0.5, 0.6], [0.7, 0.71, 0.1]]))
    clip = replace(bright(1.0), see=lambda pictures: seen, read=lambda _: torch.eye(3)[:2])
    told = run(Presence(Presence.Config(), loaded=clip), n=3).record["presence"]
    assert told["scores"][0] > told["scores"][1] > 0 > told["scores"][2]
    assert told["best"] == 1


def test_a_run_without_the_subject_ends_at_its_step():
    events = []
    absent = Presence(Presence.Config(step=2, stop=True), loaded=bright(-1.0))
    with pytest.raises(Stopped, match="no picture shows the subject at step 2") as ended:
        run(absent, callback=events.append)
    assert (ended.value.scores, ended.value.step) == ([-1.0, -1.0], 2)
    assert ended.value.where == "plugins.presence"
    assert max(e["step"] for e in events if e["kind"] == "step") < 3
    present = Presence(Presence.Config(step=2, stop=True), loaded=bright(1.0))
    assert run(present).record["presence"]["present"]


def test_a_detector_looks_for_the_words_at_its_threshold():
    for least, present in ((0.0, True), (1.0, False)):
        options = Presence.Config(detector="grounding_dino", subject="dog", threshold=least)
        result = run(Presence(options, loaded=Seen()))
        brightness = result.images["edit"].mean((1, 2, 3))
        torch.testing.assert_close(result.board["presence:scores"], brightness)
        assert result.record["presence"]["present"] is present
    blind = Presence.Config(detector="grounding_dino", subject="cat", threshold=0.1)
    assert run(Presence(blind, loaded=Seen())).record["presence"]["scores"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"detector": "grounding_dino"}, "plugins.presence.subject"),
        ({"step": 9}, "plugins.presence.step"),
    ],
)
def test_what_cannot_be_looked_for_is_refused(options, where):
    with pytest.raises(ConfigError) as refused:
        run(Presence(Presence.Config(**options)))
    assert refused.value.where == where


def test_clip_needs_a_text_without_the_subject():
    session = inlay.Session(flux(), {"presence": Presence()})
    with pytest.raises(ConfigError, match=r"prompt\.source"):
        session.run("a dog", conds=conds(), steps=2)


# the ladder -----------------------------------------------------------------------------------


def judged(threshold):
    return {"plugins": {"presence": {"threshold": threshold}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Random pictures: no score reaches 2, each reaches -2."""
    folder = folders.save_flux(tmp_path_factory.mktemp("flux"))
    told = {"model": str(folder), "prompt": PROMPT, "steps": 4, "n": 2, "device": "cpu"}
    told["plugins"] = {"presence": {"threshold": 2.0, "stop": True, "step": 1}}
    return config.from_dict(told)


def test_the_ladder_stops_early_and_at_the_first_success(base):
    exp = config.over(base, {"ladder": [{"seed": "next"}, {"steps": 3, **judged(-2)}, {"seed": 9}]})
    events = []
    result = climb(exp, events.append)
    passes = [i for i, e in enumerate(events) if e["kind"] == "pass"]
    made = [sum(e["kind"] == "step" for e in events[a:b])
            for a, b in zip(passes, [*passes[1:], None], strict=True)]  # fmt: skip
    assert made == [1, 1, 3]  # a run is given up in step 1, before that step is told
    assert [t["step"] for t in result.record["ladder"]] == [1, 1, None]
    assert [t["present"] for t in result.record["ladder"]] == [False, False, True]
    assert result.record["ladder"][1]["over"] == {"seed": "next"}
    taken = config.over(base, {"seed": 1, "steps": 3, **judged(-2)})
    assert result.manifest["experiment"] == config.to_dict(taken)
    assert torch.equal(result.images["edit"], experiment.execute(taken).images["edit"])
    assert result.manifest["weights"]


def test_of_a_spent_ladder_the_best_rung_is_run_to_its_end(base):
    result = climb(config.over(base, {"ladder": [{"seed": "next"}, {"seed": "next"}]}))
    scores = [max(t["scores"]) for t in result.record["ladder"]]
    best = scores.index(max(scores))
    assert not any(t["present"] for t in result.record["ladder"])
    assert result.record["experiment"]["seed"] == best
    plain = config.over(base, {"seed": best, "plugins": {"presence": {"stop": False}}})
    assert torch.equal(result.images["edit"], experiment.execute(plain).images["edit"])


def test_without_a_ladder_a_run_is_a_run(base):
    exp = config.over(base, judged(-2))
    assert "ladder" not in climb(exp).record


@pytest.mark.parametrize(
    ("ladder", "where"),
    [
        ([{}, {"sted": 1}], "ladder[1].sted"),
        ([{"model": "toybox/sd"}], "ladder[0]"),
        ([{"steps": 0}], "ladder[0].steps"),
    ],
)
def test_a_rung_that_does_not_fit_is_named_before_anything_runs(base, ladder, where):
    with pytest.raises(ConfigError) as refused:
        rungs(config.over(base, {"ladder": ladder}))
    assert refused.value.where == where


def test_a_ladder_needs_somebody_who_judges():
    with pytest.raises(ConfigError, match="presence"):
        rungs(config.from_dict({"ladder": [{"seed": 1}]}))
