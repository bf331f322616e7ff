"""The built-in evaluators: plugins that measure a model without knowing which strategy ran."""
