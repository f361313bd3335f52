"""Every setting of Megatron's configurations, with a verdict: proved, neutral or refused."""
