"""What the words and figures of the page mean: each said once, in a footnote."""

from __future__ import annotations

from tying.report.data import ReportData

_ALL: dict[str, tuple[str, str]] = {
    "unique": (
        "Unique values",
        "Non-zero numbers, each tie counted once however often it is used. The ratio is all parameters of the "
        "dense network ÷ unique numbers of the small one; labels are not counted (the definition of the GrOWL paper).",
    ),
    "stored": (
        "Stored",
        "Unique numbers plus the labels that say which group has which value, in bits, as bytes. The ratio counts the "
        "labels too.",
    ),
    "file": ("File", "Bytes of the .safetensors file on disk, with its header. 1 kB is 1000 bytes."),
    "operations": (
        "Operations",
        "Multiplications of two numbers with their additions, in one forward pass of one sample.",
    ),
    "latency": ("Time", "Median of one forward pass on one thread; in brackets the quartiles."),
    "accuracy": (
        "Accuracy",
        "Share of samples classified rightly. The validation split made every choice; the test split was looked at "
        "once, at the end. A point is one percentage point.",
    ),
    "group": (
        "Group",
        "The weights that are kept, removed or shared as one: for “inputs”, all weights that read one input unit or "
        "channel; for “outputs”, all weights that make one unit or channel.",
    ),
    "similarity": (
        "Similarity",
        "S(i, j) = wᵢ·wⱼ / max(‖wᵢ‖², ‖wⱼ‖²): 1 if two groups are equal, lower if they differ in direction or length, "
        "−1 if they are opposite.",
    ),
    "weights": (
        "Weights λ",
        "The penalty is the sum of λ₁ × the largest group norm, λ₂ × the second largest, and so on. Because λ falls, "
        "groups of similar norm are drawn to the same norm, and weak ones to zero.",
    ),
}


def definitions(data: ReportData, used: set[str]) -> dict[str, tuple[str, str]]:
    """Return the definitions that this page needs: name to title and text.

    Args:
        data: The data of the page.
        used: The names that the table refers to.
    """
    needed = set(used)
    if data.layers:
        needed.add("group")
    if any(layer.similarity for layer in data.layers):
        needed.add("similarity")
    if any(layer.weights for layer in data.layers):
        needed.add("weights")
    return {name: entry for name, entry in _ALL.items() if name in needed}
