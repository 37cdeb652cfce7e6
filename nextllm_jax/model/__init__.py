"""The Llama-style decoder, and the legend of dimension letters that the whole package uses.

Arrays carry their dimensions as a suffix (`x_BTD`); einsums use the same capitals.

    B  batch                      N  query heads
    T  query time                 K  key and value heads
    S  key (cache) time           G  query heads per key head, N / K
    D  embed                      H  head dim
    F  mlp                        V  vocabulary
    L  layers                     C  tokens of one chunk

Logical axes, named once per parameter at its initializer, are words:
`batch seq embed heads kv_heads head_dim mlp vocab layers norm`.
"""
