"""What papers claim of their models, beside what a comparison measures of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ufbert.compare.results import Comparison, Model
from ufbert.compare.verdict import after, mean_scores, narrowest, paired


@dataclass(frozen=True)
class Claim:
    """A claim of a paper about a preset."""

    preset: str
    paper: str
    says: str
    peers: tuple[str, ...]
    """Presets that stand for what the paper compares with; the first of these in the comparison is taken."""


CLAIMS = (
    Claim(
        "crammed_bert", "Geiping & Goldstein 2022, arXiv 2212.14034", "close to BERT on GLUE after a day on one GPU",
        ("bert_base",),
    ),
    Claim(
        "ultrafastbert_1x11", "Belcak & Wattenhofer 2023, arXiv 2311.10770",
        "on par with similar BERT models with 0.3 % of the neurons; a feedforward layer on a CPU 78 times as fast",
        ("bert_base", "crammed_bert"),
    ),
    Claim(
        "original_fff", "Belcak & Wattenhofer 2023, arXiv 2308.14711",
        "in vision transformers 94.2 % of the performance with 1 % of a layer's neurons; up to 220 times as fast as "
        "feedforward networks",
        ("crammed_bert", "bert_base"),
    ),
    Claim(
        "fnet", "Lee-Thorp et al. 2021, arXiv 2105.03824",
        "92 to 97 % of BERT's accuracy on GLUE; trains 80 % faster on GPUs at 512 tokens", ("bert_base",),
    ),
    Claim(
        "switch_8e", "Fedus et al. 2021, arXiv 2101.03961",
        "up to 7 times the pretraining speed of T5 with as much computation", ("crammed_bert", "bert_base"),
    ),
)  # fmt: skip


def claim_rows(results: Comparison) -> list[list[str]]:
    """Return (preset, paper, what it says, what was measured here) of every claim about a model of the comparison."""
    models = {_preset(model): model for model in reversed(results.models)}  # of several of a preset, the first
    rows = []
    for claim in CLAIMS:
        peer = next((models[name] for name in claim.peers if name in models), None)
        if claim.preset in models and peer:
            found = _measured(results, models[claim.preset], peer)
            rows.append([models[claim.preset].name, claim.paper, claim.says, "; ".join(found) or "not measured"])
    return rows


def _preset(model: Model) -> str:
    """Return the preset that a model's options name."""
    words: Sequence[str] = model.options
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return model.name


def _measured(results: Comparison, model: Model, peer: Model) -> list[str]:
    """Say how a model stands to another in loss, on GLUE and in the time of a call."""
    found = []
    gap = paired(model.by_tokens, peer.by_tokens) if model.by_tokens and peer.by_tokens else None
    if gap is not None:
        worse = "above" if gap.mean > 0 else "below"
        seeds = "one seed" if gap.n == 1 else f"{gap.n} seeds"
        found.append(f"{abs(gap.mean):.3f} nats {worse} {peer.name} {after(results, 'tokens')} ({seeds})")
    means = mean_scores(results)
    if model.name in means and peer.name in means:
        share = means[model.name] / means[peer.name]
        n_tasks = len({score.task for score in model.glue})
        found.append(f"{100 * share:.1f} % of {peer.name}'s mean on {n_tasks} GLUE task(s)")
    for case in results.speed.shapes[:1] if results.speed else []:
        times = {one.model: one for one in narrowest(case)}
        if model.name in times and peer.name in times:
            ratio = times[peer.name].median / times[model.name].median
            kind = times[model.name].type
            found.append(
                f"{ratio:.2f} times as fast as {peer.name} in calls of {case.batch} x {case.tokens} tokens, {kind}"
            )
    return found
