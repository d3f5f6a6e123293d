// libax_ivps, the image processing of a board: LLM runners include this header and call nothing of it.
#pragma once

#include "ax_base_type.h"
