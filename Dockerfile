# diffusers_cf with the shipped models. URL is the index that PyTorch's site names for a CPU:
#     docker build -t diffusers_cf --build-arg TORCH_INDEX=URL .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD":/data diffusers_cf segment PATIENT --model flair_tumour_small --output OUT
# for an NVIDIA GPU, since pip's own choice is a CUDA build (run it with --gpus all):
#     docker build -t diffusers_cf .
# with Apptainer, from the image that Docker has built:
#     apptainer build diffusers_cf.sif docker-daemon:diffusers_cf:latest
#     apptainer run --nv --bind "$PWD":/data --pwd /data diffusers_cf.sif segment PATIENT --model flair_tumour_small --output OUT
FROM python:3.11-slim
ARG TORCH_INDEX=
WORKDIR /opt/diffusers_cf
COPY constraints.txt ./
# torch first: once it is there, no other package asks for its newest build
RUN pip install --no-cache-dir "$(sed -n '/^torch==/p' constraints.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE THIRD_PARTY.md train_counterfactual.py ./
COPY diffusers_cf ./diffusers_cf
RUN sed -i '/^torch==/d' constraints.txt \
    && pip install --no-cache-dir --constraint constraints.txt '.[phantom,app,dicom,skull,train]'
RUN useradd --create-home --uid 1000 user && mkdir /data && chown user /data
USER user
# where any user may write
ENV HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /data
ENTRYPOINT ["diffusers-cf"]
CMD ["--help"]
