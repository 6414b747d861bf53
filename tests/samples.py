"""One model of each family, for the tests that every family has to pass."""

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
