"""Cohere's own client, which reranks."""

from __future__ import annotations

from measure.clients.asking import DOCUMENTS, SOUGHT, Asks, ServedPair, raised, require, same

CLIENT = "cohere"


def asks(served: ServedPair) -> Asks:
    import cohere

    first = cohere.Client(api_key=served.key, base_url=served.vectors)
    second = cohere.ClientV2(api_key=served.key, base_url=served.vectors)

    def rerank() -> None:
        for client in (first, second):
            got = client.rerank(model="minilm", query=SOUGHT, documents=DOCUMENTS, top_n=2)
            same(got.results[0].index, 1)
            require(0 <= got.results[1].relevance_score <= got.results[0].relevance_score <= 1, got)

    def errors() -> None:
        def ask(client: cohere.ClientV2 = second, model: str = "minilm") -> object:
            return client.rerank(model=model, query=SOUGHT, documents=DOCUMENTS)

        stranger = cohere.ClientV2(api_key="another", base_url=served.vectors)
        raised(cohere.UnauthorizedError, "key", lambda: ask(stranger))
        raised(cohere.NotFoundError, "no model", lambda: ask(model="other"))

    return {"rerank, v1 and v2": rerank, "errors by class": errors}
