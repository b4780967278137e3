"""From chat data to tokens with loss masks: sources, conversations, chat templates, the token table.

Nothing here knows a model, a cache or a trainer; torch is never imported.
"""
