"""A picture as the source of Prompt-to-Prompt: it is inverted, and the edit starts where it ends.

null_text         the null prompt is optimised in every step, until guidance leads the source along
                  its inverted path (null-text inversion, Mokady et al. 2023, algorithm 1)
negative_prompt   the null prompt is the source's: nothing to optimise (Miyake et al. 2023)
direct            the source is put back on its path in every step (Ju et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, hookimpl, tabulate
from inlay_plugins.inversion import DdimInverter, Inverter


class NullText(Plugin):
    """Consumes `latent:source`; publishes `start:edit`. A pass of its own inverts the source, under
    prompt.source without guidance; in the edit's pass the lane `source` is written by this plugin.

    path: the source's latents `1 …`, noisiest first. It answers for its lane before a guider does.
    """

    before = ("guider",)

    @dataclass
    class Config:
        """iterations: of Adam in a step, at most; it stops below the loss `tolerance`, which grows
        by 2e-5 a step. rate: of learning, less by a hundredth of it in each step.
        """

        method: Literal["null_text", "negative_prompt", "direct"] = "null_text"
        iterations: int = 10
        tolerance: float = 1e-5
        rate: float = 1e-2

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, request = self.cfg, need.request
        if cfg.iterations < 1:
            raise ConfigError("less than one iteration", where=f"plugins.{need.owner}.iterations",
                              fix="Use 1 or more, or method: direct.")  # fmt: skip
        if not request.guided("edit"):
            problem = "there is no null prompt without classifier-free guidance"
            fix = "Raise guidance above 1, or true_cfg for FLUX; some models know no such guidance."
            raise ConfigError(problem, where=f"plugins.{need.owner}", fix=fix)
        need.consume("latent:source")
        need.publish("start:edit")
        need.pass_(need.owner, _inverter)
        alone: dict[str, Any] = {"prompt": "source", "guidance": 1.0, "true_cfg": 1.0}
        need.lane("inverted", need.owner, keep=False, **alone)
        every = range(request.steps)
        need.lane("source", active=every, prompt="source")
        if cfg.method == "null_text":
            need.branch("source", need.owner, cond="negative", active=every)
            need.evaluations(request.steps * (cfg.iterations + 1))

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        if self.cfg.method == "negative_prompt":
            run.conds["edit/null"] = run.conds["source/text"]
        (lane,) = (lane for lane in run.plan.passes[-1].lanes if lane.name == "edit")
        self.scale = run.backbone.cfg_scale(lane.guidance, lane.true_cfg)

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        if pass_ == self.name:
            x["inverted"] = run.board["latent:source"]
            self.path = [x["inverted"]]
        elif pass_ == "edit":
            run.board["start:edit"] = x["edit"] = self.path[0].expand_as(x["edit"])

    @hookimpl
    def inlay_pre_step(self, run: Run, step: Step) -> None:
        if step.pass_ != "edit":
            return
        astray = self.cfg.method != "direct" and step.eval > 0
        step.x["source"] = self.reached if astray else self.path[step.eval]
        if self.cfg.method == "null_text":
            null = replace(run.conds[f"source/{self.name}"], embeds=self._optimised(run, step))
            run.conds[f"source/{self.name}"] = run.conds["edit/null"] = null

    @hookimpl
    def inlay_combine(self, step: Step, lane: str, text: Tensor) -> Tensor | None:
        """The source is guided as the edit is, whatever its own guidance."""
        if step.pass_ != "edit" or lane != "source" or self.cfg.method == "direct":
            return None
        null = step.preds.get(f"source/{self.name}", text)
        return null + self.scale * (text - null)

    @hookimpl
    def inlay_post_step(self, step: Step) -> None:
        if step.pass_ == self.name:
            self.path.insert(0, step.x_next["inverted"])
        elif step.pass_ == "edit":
            self.reached = step.x_next["source"]

    def _optimised(self, run: Run, step: Step) -> Tensor:
        """The embedding `1 t c` of the null prompt that leads to where the path is after this step,
        begun at the last step's."""
        cfg, branch, x = self.cfg, f"source/{self.name}", step.x["source"]
        cond = run.conds[branch]
        if torch.equal(step.frame.sigma, step.next_frame.sigma):  # no prediction moves anything
            return cond.embeds
        target = self.path[step.eval + 1]
        text = run.evaluate(step, {"source/text": x})["source/text"]
        embeds = cond.embeds.to(torch.promote_types(cond.embeds.dtype, torch.float32), copy=True)
        adam = torch.optim.Adam([embeds.requires_grad_()], cfg.rate * (1 - step.index / 100))
        for _ in range(cfg.iterations):
            with torch.enable_grad():
                asked = {branch: replace(cond, embeds=embeds.to(cond.embeds))}
                null = run.evaluate(step, {branch: x}, conds=asked)[branch]
                x0 = step.frame.x0(null + self.scale * (text - null), x)
                following = step.next_frame.noise(x0, step.frame.eps(x0, x))
                loss = F.mse_loss(following, target)
                (embeds.grad,) = torch.autograd.grad(loss, embeds)
            adam.step()
            if loss < cfg.tolerance + 2e-5 * step.index:
                break
        return embeds.detach().to(cond.embeds)


def _inverter(base: Any) -> Inverter:
    """DDIM inversion, or Euler's of a flow model."""
    flow = tabulate(base)[0].predicts == "flow"
    return Inverter(base) if flow else DdimInverter(base)
