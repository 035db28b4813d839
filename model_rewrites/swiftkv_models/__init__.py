"""SwiftKV forms of transformers models: configuration, model classes and the conversion of base weights."""
