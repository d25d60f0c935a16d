// cuBLAS of a card that does nothing: it counts products. Its headers need more than the wheels
// bring, so handles are plain pointers here.
#include <stdlib.h>
#include <string.h>

#include "counting.h"

// Functions that make something whose content nobody reads.
#define MAKES(name)                 \
    EXPORT int name(void **made) {  \
        *made = calloc(1, 512);     \
        return 0;                   \
    }

#define FREES(name)                \
    EXPORT int name(void *made) {  \
        free(made);                \
        return 0;                  \
    }

MAKES(cublasCreate_v2)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
FREES(cublasDestroy_v2)
FREES(cublasLtMatmulDescDestroy)
FREES(cublasLtMatmulPreferenceDestroy)
FREES(cublasLtMatrixLayoutDestroy)

EXPORT int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

// cublasLtMatmulHeuristicResult_t
typedef struct {
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} Result;

// One algorithm is found, and it needs no workspace.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c,
                                          void *d, void *preference, int wanted, Result *results,
                                          int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return 0;
}
