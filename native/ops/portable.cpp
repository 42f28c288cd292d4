// Norms, rotation and attention for the baseline of any processor.
#define OPS ops_portable
#include "ops/ops.inc.h"
