"""Drop-ins for other trainers: each module of this package serves the one that it is named after.

    import fuserl.trainers.trl
    fuserl.trainers.trl.patch()

A module's `report()` says what its `patch()` replaced and what it left, and `unpatch()` takes it out again.
"""
