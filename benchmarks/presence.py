"""How often `presence` is right in the middle of a run: python benchmarks/presence.py

Twelve classes, three pictures each, inserted by Add-it with options that suit the toybox's FLUX and
with options too weak to insert anything. What is there is what the toybox's detector finds in the
finished picture.
"""

from __future__ import annotations

from collections import Counter

import inlay
from inlay import Plugin, hookimpl
from inlay_config import config
from inlay_plugins.presence import Presence
from inlay_toybox import captions, path
from inlay_toybox.classes import BY_NAME
from inlay_toybox.detector import Detector

THINGS = {
    "dog": "grass", "horse": "grass", "cow": "road", "penguin": "snow", "canoe": "lake",
    "bicycle": "road", "chair": "sand", "cactus": "grass", "whale": "lake", "sheep": "snow",
    "pig": "sand", "elephant": "grass",
}  # fmt: skip
STEPS, PICTURES = 16, 3
OPTIONS = {"suitable": (0.07, 1.15), "weak": (0.3, 0.7)}  # structure_transfer.step, gamma


class Middle(Plugin):
    """What `presence` sees of the clean estimate in its step, without ending the run."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(name="middle")
        self.presence, self.scores = presence, [0.0]

    @hookimpl
    def inlay_post_step(self, run, step):
        if step.pass_ == "edit" and step.index == self.presence.step:
            picture = run.backbone.decode(step.x0["edit"], run.size)
            self.scores, _ = self.presence.look(run, picture)


def main() -> None:
    pipe = inlay.Session("toybox/flux").backbone.pipe
    detector, seen = Detector.from_pretrained(path("detector")), Counter[tuple[bool, bool]]()
    for name, ground in THINGS.items():
        prompt = {"source": f"a view of the {ground}"}
        prompt["edit"] = f"{BY_NAME[name].article} {name} {captions.PREPOSITION[ground]}"
        for start, gamma in OPTIONS.values():
            words = [f"subject={name}", f"plugins.structure_transfer.step={start}"]
            exp = config.load("addit", [*words, f"plugins.weighted_attention.gamma={gamma}"])
            presence = Presence()
            middle = Middle(presence)
            plugins = {**exp.plugins, "presence": presence, "middle": middle}
            asked = {"guidance": 1.0, "true_cfg": 3.0, "steps": STEPS, "n": PICTURES, "seed": 3}
            result = inlay.Session(pipe, plugins).run(prompt, **asked)
            found = detector.detect(result.images["edit"])
            seen.update(
                (name in there.classes, score >= 0)
                for there, score in zip(found, middle.scores, strict=True)
            )
    for there in (True, False):
        right, all_ = seen[there, there], seen[there, True] + seen[there, False]
        print(f"{'present' if there else 'absent'}: right of {right} of {all_} pictures")


if __name__ == "__main__":
    main()
