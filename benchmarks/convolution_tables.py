"""The tables of what concerns convolutions and real networks: trained, compacted, timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Results = Mapping[str, Any]


def speed_in_short(conv: Results, resnet50: Results) -> Iterator[str]:
    """Lines for the front page: a tied convolution, and ResNet-50."""
    for timing in conv["timings"]:
        if timing["dtype"] == "float32":
            pruned = " and half of the outputs pruned" if timing["outputs_pruned"] else ""
            yield (
                f"- Convolution 3 × 3, 256 channels at 28², half of the inputs zero, the others tied 3:1{pruned}, one "
                f"thread, batch {conv['layer']['batch']}, {_LAYOUTS[timing['layout']]}: **"
                f"{timing['faster']['median']:.1f}×** faster than dense (by operations: {timing['ideal']:.1f}×)."
            )
    faster, ideal = resnet50["networks"]["faster best"]["median"], resnet50["ideal"]
    yield (
        f"- ResNet-50, {resnet50['network']['zero']:.0%} of the channels zero and {resnet50['network']['tied']} tied "
        f"to one, batch {resnet50['network']['batch']}, each network in its best layout: **{faster:.1f}×** faster "
        f"({faster / ideal:.0%} of the {ideal:.1f}× by operations)."
    )


def speed(conv: Results, resnet50: Results) -> Iterator[str]:
    """A tied convolution in every layout, and ResNet-50 as a whole and layer by layer."""
    yield "### Tied convolutions, timed"
    yield ""
    yield (
        "One thread, dense and compacted in turn, median and quartiles of the ratio. Convolution 3 × 3, 256 channels "
        "at 28², half of the inputs zero, the others tied 3:1:"
    )
    yield ""
    yield "| | dense, ms | tied, ms | faster | by operations |"
    yield "|---|---|---|---|---|"
    for timing in conv["timings"]:
        pruned = ", half of the outputs pruned" if timing["outputs_pruned"] else ""
        dense, tied = (1e3 * timing[f"{kind}_seconds"]["median"] for kind in ("dense", "tied"))
        yield (
            f"| {timing['dtype']}, {_LAYOUTS[timing['layout']]}{pruned} | {dense:.1f} | {tied:.1f} | "
            f"{_quartiles(timing['faster'])} | {timing['ideal']:.1f} |"
        )
    yield ""
    yield (
        f"ResNet-50 at {resnet50['network']['size']}², {resnet50['network']['zero']:.0%} of the channels zero and "
        f"{resnet50['network']['tied']} tied to one, by operations {resnet50['ideal']:.2f}:"
    )
    yield ""
    yield "| | faster | of the ideal | slowest layer, dense ÷ compacted |"
    yield "|---|---|---|---|"
    for layout in (*_LAYOUTS, "best"):
        faster = resnet50["networks"][f"faster {layout}"]
        layers = resnet50.get(f"layers {layout}")
        slowest = min(layers, key=lambda each: each["faster"]["median"]) if layers else None
        said = f"{slowest['faster']['median']:.2f} ({slowest['layer']})" if slowest else ""
        share = f"{faster['median'] / resnet50['ideal']:.0%}"
        name = _LAYOUTS.get(layout, "each in its best layout")
        yield f"| {name} | {_quartiles(faster)} | {share} | {said} |"


def sharing(results: Results) -> Iterator[str]:
    """What sharing is worth: the same map as dense, locally connected and convolutional layer."""
    yield "### What sharing is worth"
    yield ""
    yield (
        "The map 1 × 28 × 28 → 8 × 14 × 14 on Fashion-MNIST as dense, locally connected and convolutional layer, then "
        "one linear head; rate and decay chosen on validation. Test accuracy in per cent, mean ± standard deviation:"
    )
    yield ""
    layers = list(results["costs"])
    yield "| | " + " | ".join(layers) + " |"
    yield "|---|" + "---|" * len(layers)
    lines = {(each["layer"], each["samples"]): each for each in results["lines"]}
    sizes = sorted({samples for _, samples in lines})
    for samples in sizes:
        yield f"| {samples:,} samples | " + " | ".join(_accuracy(lines[layer, samples]) for layer in layers) + " |"
    for pixels in range(1, len(lines[layers[0], sizes[-1]]["by_shift"])):
        cells = [f"{statistics.mean(lines[layer, sizes[-1]]['by_shift'][pixels]):.1f}" for layer in layers]
        yield f"| {sizes[-1]:,} samples, test images moved by {pixels} | " + " | ".join(cells) + " |"
    costs = [results["costs"][layer] for layer in layers]
    yield "| values of the layer | " + " | ".join(f"{cost['layer_values']:,}" for cost in costs) + " |"
    yield "| multiply-adds of the layer | " + " | ".join(f"{cost['layer_operations']:,}" for cost in costs) + " |"
    yield "| file, with the head | " + " | ".join(f"{cost['file_bytes'] / 1000:.0f} kB" for cost in costs) + " |"
    memory = [f"{cost['memory']['peak_bytes'] / 1e6:.1f} MB" for cost in costs]
    yield "| peak memory at training | " + " | ".join(memory) + " |"
    seconds = [f"{cost['epoch_seconds']['median']:.2f} s" for cost in costs]
    yield "| an epoch | " + " | ".join(seconds) + " |"
    yield ""
    yield "[As a picture](results/sharing.png)."


def stage_two_memory(results: Results) -> Iterator[str]:
    """Whether peak memory of stage two falls with the values stored."""
    yield "### Memory of stage two"
    yield ""
    yield (
        "Training the compacted network in a fresh process, times less than the dense one: peak resident memory above "
        "PyTorch and the batch, and beside it what is held by parameters, gradients and the optimizer."
    )
    yield ""
    yield "| network | batch | values, times fewer | peak memory, times less | state, times less | peak |"
    yield "|---|---|---|---|---|---|"
    for line in results["lines"]:
        fewer = line["times_fewer"]
        yield (
            f"| {line['network']} | {line['batch']} | {fewer['values']:.1f} | {fewer['peak']:.2f} | "
            f"{fewer['state']:.1f} | {line['peak_bytes'] / 1e6:.1f} MB |"
        )
    yield ""
    yield "[As a picture](results/stage_two_memory.png)."


def lenet(results: Results) -> Iterator[str]:
    """LeNet-5 at two sizes, with its controls."""
    one, two = results["settings"]["epochs"]
    yield (
        f"LeNet-5 (20-50-500-10, {results['parameters']:,} parameters), test accuracy in per cent, mean ± standard "
        f"deviation over seeds, {one} + {two} epochs, no augmentation; strengths and shapes chosen on validation. In "
        "brackets all parameters ÷ numbers stored; labels come on top and are in the bytes."
    )
    yield ""
    sizes = sorted({line["size"] for line in results["lines"]} - {1})
    columns = [(data, size) for data in ("mnist", "fashion-mnist") for size in (1, *sizes)]
    heads = [f"{_NAMES[data]}, {'dense' if size == 1 else f'{size:g}×'}" for data, size in columns]
    yield "| | seeds | " + " | ".join(heads) + " |"
    yield "|---|---|" + "---|" * len(columns)
    lines = {(line["method"], line["dataset"], line["size"]): line for line in results["lines"]}
    for method in dict.fromkeys(line["method"] for line in results["lines"]):
        mine = [lines.get((method, *column)) for column in columns]
        cells = [f"{_accuracy(line)} ({line['ratio']:.1f}×)" if line else "" for line in mine]
        seeds = max(len(line["seeds"]) for line in mine if line)
        yield f"| {_LABELS.get(method, method)} | {seeds} | " + " | ".join(cells) + " |"
    files = [lines.get((_TIED if size > 1 else "dense", data, size)) for data, size in columns]
    yield "| bytes on disk, labels included (GrOWL before) | | " + " | ".join(map(_kilobytes, files)) + " |"
    operations = [f"{line['operations'] / 1e6:.2f} M" if line else "" for line in files]
    yield "| multiply-adds (GrOWL before) | | " + " | ".join(operations) + " |"


def resnet20(results: Results) -> Iterator[str]:
    """ResNet-20 at a quarter of its values, with its controls."""
    one, two = results["settings"]["epochs"]
    yield "### ResNet-20"
    yield ""
    yield (
        f"ResNet-20 on CIFAR-10 ({results['parameters']:,} parameters), {one} + {two} epochs (what two cores allow), "
        "test accuracy at the last epoch; the learning rate of the last epochs chosen on validation, by each method; "
        "points below dense are of the same seeds:"
    )
    yield ""
    yield "| | seeds | stored values | file | multiply-adds | test accuracy | below dense |"
    yield "|---|---|---|---|---|---|---|"
    for line in results["lines"]:
        yield (
            f"| {_LABELS.get(line['method'], line['method'])} | {len(line['seeds'])} | {line['ratio']:.1f}× fewer | "
            f"{_kilobytes(line)} | {line['operations'] / 1e6:.1f} M | {_accuracy(line)} | {line['below_dense']:.2f} |"
        )


def channels_in_short(results: Results) -> Iterator[str]:
    """A line for the front page: what removing and tying did to real architectures."""
    found = results["architectures"].values()
    draws, equal, wrong = (sum(each[what] for each in found) for what in ("draws", "equal", "silently_wrong"))
    yield (
        f"- {len(found)} architectures, from LeNet-5 to ResNet-50, MiniLM and a U-Net, compacted {draws:,} times with "
        f"zeros and ties planted at random: {equal:,} equal in float64, {wrong} silently wrong; "
        f"{_share(found, 'removed', 'exact'):.1%} of what can go exactly went. {_drawn(results['graphs'])}"
    )


def channels(results: Results) -> Iterator[str]:
    """What came of compacting real architectures and drawn networks, and of a peer on the same plants."""
    yield "### Real architectures, compacted"
    yield ""
    yield (
        "Zero channels, zero heads and ties planted at random; compacted against planted, float64, 1e-9. What can go "
        "exactly is found by trial, without the package; as counted: draws in which all of it went and the parameters "
        f"left are those counted by hand. Beside it what {results['peer']['package']} does to some of the same plants:"
    )
    yield ""
    yield "| | draws | equal | silently wrong | refused | crashed | removed | heads | as counted | smaller | peer |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    peers = results["peer"]["architectures"]
    for name, found in results["architectures"].items():
        counts = " | ".join(f"{found[what]}" for what in ("draws", "equal", "silently_wrong", "refused", "crashed"))
        heads = "" if found["share_of_heads_removed"] is None else f"{found['share_of_heads_removed']:.1%}"
        peer = ", ".join(f"{count} {what}" for what, count in peers.get(name, {}).items())
        yield (
            f"| {name} | {counts} | {found['share_removed']:.1%} | {heads} | {found['as_counted']} of "
            f"{found['all_removed']} | {found['compression']['median']:.2f}× | {peer} |"
        )
    yield ""
    graphs = results["graphs"]
    yield (
        f"{_drawn(graphs)} There {graphs['share_removed']:.0%} of the outputs that nobody feels in single "
        f"trials were removed ({graphs['unread_removed']:,} of {graphs['unread']:,}). Most frequent reasons of the "
        "others:"
    )
    yield ""
    for reason, count in list(graphs["stay_because"].items())[:8]:
        yield f"- {reason}: {count}"


_LAYOUTS = {"contiguous": "channels first", "channels_last": "channels last"}
_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion"}
_TIED = "tied, GrOWL before"
_LABELS = {
    "single weights tied at last": "single weights tied, 64 values a layer, and trained no more",
    "single weights tied": "control: single weights tied, then trained on",
    _TIED: "tied and pruned, GrOWL before",
    "tied, no penalty before": "control: tied and pruned, no penalty before",
    "pruned only": "control: pruned only",
    "narrow dense": "control: narrow dense",
}


def _drawn(graphs: Results) -> str:
    return (
        f"Of {graphs['graphs']:,} networks drawn at random from all supported operations, {graphs['equal']:,} were "
        f"equal, {graphs['silently_wrong']} silently wrong, {graphs['refused']} refused by name, "
        f"{graphs['crashed']} crashed."
    )


def _share(found: Iterable[Results], part: str, whole: str) -> float:
    return sum(each[part] for each in found) / sum(each[whole] for each in found)


def _accuracy(line: Results) -> str:
    spread = "" if line["test_spread"] is None else f" ± {line['test_spread']:.2f}"
    return f"{line['test_mean']:.2f}{spread}"


def _kilobytes(line: Results | None) -> str:
    return f"{statistics.mean(line['file_bytes']) / 1000:.1f} kB" if line else ""


def _quartiles(spread: Results) -> str:
    return f"{spread['median']:.2f} ({spread['quartile_1']:.2f}–{spread['quartile_3']:.2f})"
