"""Everything that knows about ranks: who we are, how we talk, how a model is spread over devices."""
