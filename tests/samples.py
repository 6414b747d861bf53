"""One model of each family, for the tests that every family has to pass."""

FAMILIES = (
    'cspnet_nano',
    'cspnet_tutorial',
)

# Where each run takes seconds: one of the package's own, one of the paper, one of a detector.
SCRIPT_FAMILIES = ('cspnet_nano',)
