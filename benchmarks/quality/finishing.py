"""Last parts of training under a plan, in the benchmark of the paper's claims."""

from typing import Any, NamedTuple

Config = dict[str, Any]


class Finishing(NamedTuple):
    """A last part of training that runs only some experts.

    Args:
        name: what tables call it.
        plans: selections of the feed-forward and of the attention routers, which alternate.
        part: share of the steps.
        changes: arguments of the model in place of the recipe's.
    """

    name: str
    plans: tuple[Config, ...]
    part: float
    changes: Config

    def callback(self, steps: int) -> Config:
        """What carries it out in a training of so many steps."""
        plan, *others = self.plans
        arguments = {"plan": plan, "steps": max(1, int(self.part * steps))}
        if others:
            arguments["alternate_with"] = others
        class_path = "lightning_dsmoe.callbacks.SparseFinishing"
        return {"class_path": class_path, "init_args": arguments}


def top_k(k: int) -> Config:
    """A fixed number of experts."""
    return {"class_path": "lightning_dsmoe.TopK", "init_args": {"k": k}}


def at_threshold(eps: float, part: float) -> Finishing:
    """One threshold for all routers."""
    kept = {"class_path": "lightning_dsmoe.Threshold", "init_args": {"eps": eps}}
    return Finishing(f"threshold {eps:g}", ({"experts": kept, "attention": kept},), part, {})


def consistently(finishing: Finishing) -> Finishing:
    """The same, with the predictions of all experts and of the plan kept alike."""
    changes = finishing.changes | {"consistency_weight": 1.0}
    return finishing._replace(name=f"{finishing.name}, consistency 1", changes=changes)


def by_turns(first: Finishing, second: Finishing) -> Finishing:
    """The plans of two in alternation, for the part of the first."""
    name, plans = f"{first.name} by turns with {second.name}", first.plans + second.plans
    return first._replace(name=name, plans=plans)


_FIXED = Finishing("top 2 and 5", ({"experts": top_k(2), "attention": top_k(5)},), 0.5, {})
FINISHINGS = {
    "finished sparsely": at_threshold(0.3, 0.2),
    "finished more sparsely": at_threshold(1.5, 0.5),
    "finished at fixed numbers": _FIXED,
    "finished consistently": consistently(_FIXED),
    "finished consistently at threshold 2": consistently(at_threshold(2.0, 0.5)),
    "finished consistently by turns": consistently(by_turns(_FIXED, at_threshold(1.0, 0.5))),
}
"""Those of every DS-MoE model; the numbers are of 18 feed-forward and 8 attention experts."""
