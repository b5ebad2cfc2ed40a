"""Plugins that watch, and plugins made of functions, for the tests of the core."""

from dataclasses import dataclass, field

from inlay import Plugin, hookimpl


class Spy(Plugin):
    """Writes down every event in order, as (event, place), and changes nothing."""

    def __init__(self, log=None, name="spy"):
        super().__init__(name=name)
        self.log = [] if log is None else log

    @hookimpl
    def inlay_declare(self, need):
        self.log.append((self.name, "declare", need.request.steps))

    @hookimpl
    def inlay_prepare(self, run):
        self.log.append((self.name, "prepare", sorted(run.conds)))

    @hookimpl
    def inlay_begin(self, run, pass_, x):
        self.log.append((self.name, "begin", pass_))

    @hookimpl
    def inlay_pre_step(self, step):
        self.log.append((self.name, "pre_step", step.eval))

    @hookimpl
    def inlay_inputs(self, step, rows):
        self.log.append((self.name, "inputs", tuple(rows)))

    @hookimpl
    def inlay_combine(self, step, lane):
        self.log.append((self.name, "combine", lane))

    @hookimpl
    def inlay_denoised(self, step):
        self.log.append((self.name, "denoised", step.eval))

    @hookimpl
    def inlay_post_step(self, step):
        self.log.append((self.name, "post_step", step.eval))

    @hookimpl
    def inlay_observe(self, step):
        self.log.append((self.name, "observe", step.eval))

    @hookimpl
    def inlay_final(self, result):
        self.log.append((self.name, "final", sorted(result.images)))


def plugin(**events):
    """A live plugin of functions: plugin(declare=lambda need: ..., post_step=lambda step: ...).

    Each takes the arguments of its hook that it names, as pluggy allows.
    """
    body = {f"inlay_{event}": staticmethod(hookimpl(f)) for event, f in events.items()}
    return type("Made", (Plugin,), body)()


@dataclass(eq=False)
class Editor(Plugin):
    """One edit on lane `edit` at chosen sites and steps."""

    op: str = "gain"
    target: str = "edit"
    queries: str = "all"
    options: dict = field(default_factory=lambda: {"keys": "all", "gain": 1.5})
    active: object = None
    select: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)

    name = "editor"

    @hookimpl
    def inlay_declare(self, need):
        sites = need.select(**self.select)
        taken = {key: self.options[key] for key in ("from_", "how") if key in self.options}
        if self.op == "route":
            taken = [
                {"from_": lane, "how": key} for key, lane in self.options.items() if key != "keys"
            ]
        for one in taken if self.op == "route" else [taken]:
            need.edit(self.op, self.target, sites, self.active, queries=self.queries, **one)

    @hookimpl
    def inlay_attention(self, step, site, edits):
        self.seen.append((step.index, site.name))
        getattr(edits.on(self.target, self.queries), self.op)(**self.options)
