"""What every room speaks, without torch: types, the journal of records, registry, seeds, errors."""
