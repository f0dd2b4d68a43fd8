"""What the smaller commands compute: plan, info, ls, bench, doctor."""
