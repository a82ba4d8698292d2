"""The gateway: every image purified on its way to a multimodal LLM, as a proxy, a middleware or a client wrapper.

Importing this package imports neither torch nor the web framework.
"""
