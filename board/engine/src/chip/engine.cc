#include "chip/chip.h"

const axc::Chip axc::kChip{"AX650", 4, 3};
