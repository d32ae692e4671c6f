"""The ``vllm`` backend: an engine in process, and the tap that its workers run.

A worker selects from the full logits of scored rows, right where its model runner has the hidden
states, and keeps the signals until they are fetched. So vLLM's own log-probabilities, a Python
object for each token and entry, are never made, and prefix caching stays usable.
"""
