"""The tables of what concerns several models: ties in daily use, units found again, soft ties, bundles, hybrids."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
NONE, OWN, TORCH = "not applicable", "error, tying's", "error, PyTorch's"
KINDS = ("inside", "layers", "transposed", "models")


def ties_in_short(results: Results) -> Iterator[str]:
    """One line for the front page."""
    ours = {verdict: n for verdict, n in results["counts"]["listed"]["ours"].items() if verdict != NONE}
    by_hand = [
        row["cells"][kind]["plain, each once"]["verdict"]
        for row in results["operations"].values()
        for kind in KINDS[1:]
        if row["listed"]
    ]
    yield (
        f"- What daily use does to ties, in {sum(ours.values())} cases (operations × kinds of tie): `tie_` keeps "
        f"{ours['kept']}, mends {ours['repaired']}, says by name what broke in {ours[OWN]} (PyTorch says so in "
        f"{ours[TORCH]}), and is silent in {ours.get('silent', 0)}. Shared by hand, {by_hand.count('silent')} of "
        f"{len(by_hand) - by_hand.count(NONE)} break in silence."
    )
    cost = results["guard_cost"]["layers of a model of 200"]
    yield (
        f"- The guard of 100 ties costs {1e6 * cost['difference_seconds']['median']:.0f} µs at a forward "
        f"(its own code: {1e6 * cost['hook_seconds']['median']:.0f} µs)."
    )


def bundle_in_short(results: Results) -> Iterator[str]:
    """One line for the front page."""
    ratios = [network["file_bytes"]["ratio"] for network in results["networks"].values()]
    yield (
        f"- Two models that share all but their heads, as one file: {min(ratios):.3f} to {max(ratios):.3f} of the two "
        "apart."
    )


def ties(results: Results) -> Iterator[str]:
    """What becomes of a tie, operation by operation."""
    yield "### Ties in daily use"
    yield ""
    yield (
        "Each operation, then two steps of training whose gradients pull the ends apart, against a reference that "
        f"counts every value once. {'; '.join(f'{name}: {what}' for name, what in results['verdicts'].items())}. Ours: "
        f"{results['columns']['ours']}. Beside it in brackets what people write today, where that is another verdict: "
        "`a.weight = b.weight`, `nn.Parameter(a.weight.t())`, every parameter object once in the optimizer; inside one "
        "parameter PyTorch has no tie. – : there is no such operation."
    )
    for listed, title in ((True, ""), (False, "Beside these:")):
        yield ""
        if title:
            yield title
            yield ""
        yield "| operation | inside one parameter | two layers | transposed | two models |"
        yield "|---|---|---|---|---|"
        for name, row in results["operations"].items():
            if row["listed"] == listed:
                yield f"| {name} | " + " | ".join(_cell(row["cells"], kind) for kind in KINDS) + " |"
    yield ""
    worst = max(value for ways in results["gradients"].values() for way in ways.values() for value in way.values())
    yield (
        f"Gradient of a hard tie against the sum (mean) of the untied ones, {_ways(results)}: at most {worst:.1e} "
        "apart."
    )
    yield ""
    yield "| guard of 100 ties | at a forward, µs | its code alone, µs |"
    yield "|---|---|---|"
    for name, cost in results["guard_cost"].items():
        yield f"| {name} | {_micro(cost['difference_seconds'])} | {_micro(cost['hook_seconds'])} |"


def _cell(cells: Results, kind: str) -> str:
    ours, plain = (cells[kind][column]["verdict"] for column in ("ours", "plain, each once"))
    if ours == NONE:
        return "–"
    return ours if plain == ours or kind == "inside" else f"{ours} ({plain})"


def _ways(results: Results) -> str:
    return ", ".join(dict.fromkeys(way for ways in results["gradients"].values() for way in ways))


def _micro(spread: Results) -> str:
    return f"{1e6 * spread['median']:.1f} ({1e6 * spread['quartile_1']:.1f}–{1e6 * spread['quartile_3']:.1f})"


def align(results: Results) -> Iterator[str]:
    """Units found again; two trained networks averaged."""
    yield "### Permuted units found again"
    yield ""
    yield (
        "`match(align=True)` on a copy with permuted units, noise of so much of each parameter's deviation added: "
        "units at their place (least over seeds), copies equal to the original bit for bit, seconds (median)."
    )
    yield ""
    yield "| network | units | by | noise | units right | exact | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for row in results["recovery"]:
        exact = f"{row['exact']} of {row['seeds']}" if row["noise"] == 0 else "–"
        yield (
            f"| {row['network']} | {row['units']:,} | {row['by']} | {row['noise']:.0%} | {row['share']['least']:.2%} | "
            f"{exact} | {row['seconds']['median']:.2f} |"
        )
    pairs = results["digits"]["pairs"]
    yield ""
    alone = statistics.mean(value for pair in pairs for value in pair["alone"])
    yield (
        f"Two perceptrons trained on digits from different seeds ({len(pairs)} pairs), {alone:.1%} alone; their "
        "average, ± standard deviation:"
    )
    yield ""
    yield "| units | accuracy of the average | cosine of paired weights |"
    yield "|---|---|---|"
    for way in ("as they are", "weights", "activations"):
        values = [100 * pair[way]["average"] for pair in pairs]
        cosine = statistics.mean(statistics.mean(pair[way]["cosine"].values()) for pair in pairs)
        name = way if way == "as they are" else f"aligned by {way}"
        yield f"| {name} | {_mean(values)} | {cosine:.2f} |"


def soft(results: Results) -> Iterator[str]:
    """Distance against strength, the limit, the cost of a step."""
    yield "### Soft ties"
    yield ""
    yield (
        f"Two perceptrons on two tasks from digits, ‖w_A − w_B‖ after training, mean over {results['seeds']} seeds; "
        "the loss term only where gradient steps are stable:"
    )
    yield ""
    strengths = [line["strength"] for line in results["prox"]]
    yield "| strength | " + " | ".join(f"{strength:g}" for strength in strengths) + " |"
    yield "|---|" + "---|" * len(strengths)
    for name, way in (("proximal step", "prox"), ("loss term", "loss")):
        found = {line["strength"]: statistics.mean(line["distance"]) for line in results[way] if line["distance"]}
        yield f"| {name} | " + " | ".join(f"{found[s]:.2g}" if s in found else "–" for s in strengths) + " |"
    limit = results["limit"]
    yield ""
    yield (
        f"Monotone in {results['monotone_seeds']['prox']} of {results['seeds']} seeds (proximal step) and "
        f"{results['monotone_seeds']['loss']} (loss term). At {limit['strength']:g} the weights are within "
        f"{max(limit['largest_difference_to_hard_tie']):.1e} of those of the hard tie."
    )
    yield ""
    ways = list(results["overhead"][0]["ratio"])
    yield "| training step ÷ one without a tie | " + " | ".join(ways) + " |"
    yield "|---|" + "---|" * len(ways)
    for case in results["overhead"]:
        yield f"| {case['network']} | " + " | ".join(f"{case['ratio'][way]['median']:.2f}" for way in ways) + " |"


def bundle(results: Results) -> Iterator[str]:
    """File and memory of two models that share all but their heads."""
    yield "### Bundles"
    yield ""
    yield "Two models tied in all but their heads (10 and 5 classes), ÷ the two apart:"
    yield ""
    yield "| network | parameters | file | memory of the loaded pair |"
    yield "|---|---|---|---|"
    for name, network in results["networks"].items():
        sizes = " + ".join(f"{count:,}" for count in network["parameters"].values())
        yield f"| {name} | {sizes} | {network['file_bytes']['ratio']:.3f} | {network['memory_bytes']['ratio']:.3f} |"


def hybrid(results: Results) -> Iterator[str]:
    """Where between generative and discriminative the optimum lies; digits tied to an unsupervised twin."""
    yield "### Supervised and unsupervised"
    yield ""
    yield (
        "After Lasserre, Bishop and Minka (CVPR 2006): two classes of points, stretched by the elongation along one "
        "axis, and a generative model that takes them for round, tied to its discriminative twin; α = 0 is generative, "
        "α = 1 discriminative. Every fit is the lowest of several starts: the labelled points' own means, the solution "
        "at α = 0, those at the α below and above; how often the starts end at different minima is beside. Points of "
        "accuracy, mean ± standard error of paired differences; the inner α and the ridge of the control are chosen "
        "on one half of the seeds and all measured on the other:"
    )
    yield ""
    yield (
        "| elongation | labels per class | seeds | inner α | accuracy | gain on α = 1 | gain on α = 0 | gain on ridge "
        "logistic regression | starts disagree |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for point in results["points"]:
        chosen, disagree = point["chosen"], point["fits"]["starts disagree"]
        gains = (chosen[f"gain on {other}"] for other in ("alpha 1", "alpha 0", "logistic regression"))
        cells = " | ".join(_gain(gain) for gain in gains)
        yield (
            f"| {point['elongation']:g} | {point['labels per class']} | {point['seeds']} | {chosen['alpha']:g} | "
            f"{_percent(chosen['accuracy'])} | {cells} | {sum(disagree) / len(disagree) / point['seeds']:.1%} |"
        )
    yield ""
    yield "A digit classifier whose first layer is tied to an unsupervised twin, strength chosen on validation:"
    yield ""
    rivals = ("strength 0", "weight decay", "k-means, read-out")
    yield f"| labels per digit | twin | seeds | accuracy | {' | '.join(f'gain on {rival}' for rival in rivals)} |"
    yield "|---|---|---|---|---|---|---|"
    for setting in results["digits"]:
        for name, method in setting["methods"].items():
            chosen = method.get("chosen", {"test": method["test"].get(""), "gain on": {}})
            gains = (_gain(chosen["gain on"][rival]) if rival in chosen["gain on"] else "" for rival in rivals)
            yield (
                f"| {setting['labels per digit']} | {name} | {setting['seeds']} | {_percent(chosen['test'])} | "
                f"{' | '.join(gains)} |"
            )
    yield ""
    yield "[Accuracy against α](results/hybrid_points.png), [against strength](results/hybrid_digits.png)."


def _gain(gain: Sequence[float | None]) -> str:
    mean, error = gain
    return f"{mean:+.2f} ± " + ("–" if error is None else f"{error:.2f}")


def _percent(value: Sequence[float | None]) -> str:
    mean, error = value
    return f"{mean:.1f} ± " + ("–" if error is None else f"{error:.1f}")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
