"""What the weights of OpenMMLab have in common: who states their licence."""
from ._weights import License

__all__ = ['MMDETECTION', 'MMPOSE', 'MMROTATE']

MMDETECTION = License(
    'apache-2.0', 'LICENSE of open-mmlab/mmdetection; none is stated for the file',
    'https://github.com/open-mmlab/mmdetection/blob/main/LICENSE',
)
MMPOSE = License(
    'apache-2.0', 'a maintainer of MMPose, of all its projects: "licensed with permission for commercial use"',
    'https://github.com/open-mmlab/mmpose/issues/2393',
)
MMROTATE = License(
    'apache-2.0', 'LICENSE of open-mmlab/mmrotate; none is stated for the file',
    'https://github.com/open-mmlab/mmrotate/blob/main/LICENSE',
)
