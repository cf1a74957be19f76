"""Documents made from the table of topics and the messages: `docs/flow.md`, `docs/asyncapi.json`, access lists.

`python -m deploy.generated_docs.flow docs` writes them.
"""
