"""The proof's figures, from the server's metrics page to the report."""

from __future__ import annotations

from loadtest.seen.proof import proof_from_metrics, proof_text

PAGE = """
# TYPE trireme_proof_value gauge
trireme_proof_value{figure="worst cosine",model="minilm",version="2"} 0.99598
trireme_proof_value{figure="mean cosine",model="minilm",version="2"} 0.99872
trireme_proof_value{figure="mean cosine",model="minilm",version="1"} 0.5
trireme_proof_value{figure="mean cosine",model="other",version="2"} 0.4
trireme_proof_limit{figure="worst cosine",model="minilm",version="2"} 0.995
trireme_proof_limit{figure="mean cosine",model="minilm",version="2"} 0.998
trireme_proof_seconds{model="minilm",version="2"} 0.4
"""


def test_figures_of_the_version_that_was_measured() -> None:
    found = proof_from_metrics(PAGE, "minilm", "2")
    assert proof_text(found) == "mean cosine 0.99872 (budget 0.998), worst cosine 0.99598 (budget 0.995)"
    assert proof_from_metrics(PAGE, "minilm", "3") == ()
    assert proof_text(()) == "no figures: the service shows none"
