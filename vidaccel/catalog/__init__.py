"""All that is known about models, as rows: names, families, published settings, what differs in their calls."""
