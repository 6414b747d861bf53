"""One model of each family, for the tests that every family has to pass."""

FAMILIES = (
    'cspnet_nano',
    'cspnet_tutorial',
)
