"""What ``trust_remote_code=True`` loads from an export: configuration and modelling code."""
