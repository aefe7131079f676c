"""A stock vLLM server as the gateway's engine, over its OpenAI-compatible HTTP interface.

client.py    the engine protocol: starts, pauses, continues answers; watches the server
answer.py    one answer: what the server sent, what was shown, where it can go on
upstream.py  HTTP to the server: JSON calls and event streams
kvpool.py    pool.sock of the connector in vLLM's process (midstream_runtime.vllm_connector)
"""
