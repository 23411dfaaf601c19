"""One file an experiment; each has `get_config()`. See `meap_jax.fields` for every field."""
