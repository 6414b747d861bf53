"""One model of each family, for the tests that every family has to pass, and a few of these."""

FAMILIES = (
    'cspnet_nano',
    'cspnet_tutorial',
    'cspnet_mobilenetv2',
    'cspnet_peleenet',
    'cspnet_yolox_nano',
    'cspnet_rtmdet_nano',
    'cspnet_ppyoloe_t',
    'cspnet_yolov8n',
    'cspnet_yolo11n',
    'cspnet_yolov4_tiny',
    'cspnet_yolov9t',
    'cspnet_damo_m',
)

# What treats every network alike, a library or a compiler, meets here: levels as most are, slices of channels,
# attention, a pool between levels.
FEW = ('cspnet_nano', 'cspnet_peleenet', 'cspnet_yolo11n', 'cspnet_yolov4_tiny')
