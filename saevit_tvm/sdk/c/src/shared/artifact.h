/* Judging an artifact before a byte of it is run. */
#ifndef SAEVIT_ARTIFACT_H
#define SAEVIT_ARTIFACT_H

#include "../internal.h"

HIDDEN saevit_status saevit_check_artifact(const char *path);

#endif
