-- The app's newer module as its own migrations make it, after the core module (app_schema.sql): the files that its users
-- make, and the queue that its pages use today. In the app's own style: tables IF NOT EXISTS, the rest without.

-- A row for each exported file. Its objects lie in the bucket training-files, under the row's id. Everybody may read
-- all rows; who creates one chooses its id.
CREATE TABLE IF NOT EXISTS training_files (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  name TEXT NOT NULL,
  description TEXT,
  json_file_path TEXT NOT NULL,
  jsonl_file_path TEXT NOT NULL,
  storage_bucket TEXT NOT NULL DEFAULT 'training-files',
  conversation_count INTEGER NOT NULL DEFAULT 0,
  total_training_pairs INTEGER NOT NULL DEFAULT 0,
  json_file_size BIGINT,
  jsonl_file_size BIGINT,
  status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived', 'processing', 'failed')),
  created_by UUID REFERENCES auth.users(id),
  created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
  updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
CREATE INDEX idx_training_files_created_by ON training_files(created_by);
ALTER TABLE training_files ENABLE ROW LEVEL SECURITY;
CREATE POLICY "Users can view training files" ON training_files FOR SELECT USING (true);
CREATE POLICY "Users can create training files" ON training_files FOR INSERT WITH CHECK (auth.uid() = created_by);
CREATE POLICY "Users can update own training files" ON training_files FOR UPDATE USING (auth.uid() = created_by);

CREATE TABLE IF NOT EXISTS pipeline_training_jobs (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id UUID REFERENCES auth.users(id) ON DELETE CASCADE,
  job_name TEXT NOT NULL,
  -- pending, queued, initializing, running, completed, failed, cancelled
  status TEXT NOT NULL DEFAULT 'pending',
  training_sensitivity TEXT NOT NULL DEFAULT 'medium',
  training_progression TEXT NOT NULL DEFAULT 'medium',
  training_repetition INTEGER NOT NULL DEFAULT 3,
  learning_rate FLOAT NOT NULL DEFAULT 0.0001,
  batch_size INTEGER NOT NULL DEFAULT 4,
  epochs INTEGER NOT NULL DEFAULT 3,
  rank INTEGER NOT NULL DEFAULT 16,
  alpha INTEGER NOT NULL DEFAULT 32,
  dropout FLOAT NOT NULL DEFAULT 0.05,
  dataset_id UUID REFERENCES datasets(id),
  dataset_name TEXT,
  dataset_file_path TEXT,
  engine_id TEXT NOT NULL DEFAULT 'emotional-alignment-v1',
  engine_name TEXT NOT NULL DEFAULT 'Emotional Alignment',
  engine_features JSONB DEFAULT '[]'::jsonb,
  gpu_type TEXT NOT NULL DEFAULT 'NVIDIA A40',
  gpu_count INTEGER NOT NULL DEFAULT 1,
  estimated_cost DECIMAL(10, 2),
  actual_cost DECIMAL(10, 2),
  progress INTEGER DEFAULT 0,
  current_epoch INTEGER DEFAULT 0,
  current_step INTEGER DEFAULT 0,
  total_steps INTEGER,
  current_loss FLOAT,
  current_learning_rate FLOAT,
  tokens_per_second FLOAT,
  runpod_job_id TEXT,
  runpod_endpoint_id TEXT,
  final_loss FLOAT,
  training_time_seconds INTEGER,
  adapter_file_path TEXT,
  adapter_download_url TEXT,
  adapter_status TEXT,
  created_at TIMESTAMPTZ DEFAULT NOW(),
  started_at TIMESTAMPTZ,
  completed_at TIMESTAMPTZ,
  updated_at TIMESTAMPTZ DEFAULT NOW(),
  error_message TEXT,
  error_details JSONB
);
CREATE INDEX idx_pipeline_jobs_user_id ON pipeline_training_jobs(user_id);
CREATE INDEX idx_pipeline_jobs_status ON pipeline_training_jobs(status);
CREATE INDEX idx_pipeline_jobs_created_at ON pipeline_training_jobs(created_at DESC);

ALTER TABLE pipeline_training_jobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY "Users can view own pipeline jobs" ON pipeline_training_jobs FOR SELECT USING (auth.uid() = user_id);
CREATE POLICY "Users can create own pipeline jobs" ON pipeline_training_jobs FOR INSERT
  WITH CHECK (auth.uid() = user_id);
CREATE POLICY "Users can update own pipeline jobs" ON pipeline_training_jobs FOR UPDATE USING (auth.uid() = user_id);
CREATE POLICY "Service role has full access to pipeline jobs" ON pipeline_training_jobs FOR ALL
  USING (auth.jwt() ->> 'role' = 'service_role');

CREATE TABLE IF NOT EXISTS pipeline_training_metrics (
  id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
  job_id UUID REFERENCES pipeline_training_jobs(id) ON DELETE CASCADE,
  metric_id TEXT NOT NULL,
  metric_name TEXT NOT NULL,
  metric_level TEXT NOT NULL,
  value FLOAT NOT NULL,
  unit TEXT,
  measured_at TIMESTAMPTZ DEFAULT NOW(),
  measurement_version TEXT,
  measurement_method TEXT,
  step_number INTEGER,
  epoch_number INTEGER,
  raw_data JSONB
);
CREATE INDEX idx_pipeline_metrics_job_id ON pipeline_training_metrics(job_id);
CREATE INDEX idx_pipeline_metrics_metric_id ON pipeline_training_metrics(metric_id);
CREATE INDEX idx_pipeline_metrics_step ON pipeline_training_metrics(step_number);

ALTER TABLE pipeline_training_metrics ENABLE ROW LEVEL SECURITY;
CREATE POLICY "Users can view metrics for own jobs" ON pipeline_training_metrics FOR SELECT
  USING (
    EXISTS (
      SELECT 1 FROM pipeline_training_jobs
      WHERE pipeline_training_jobs.id = pipeline_training_metrics.job_id
        AND pipeline_training_jobs.user_id = auth.uid()
    )
  );
CREATE POLICY "Service role has full access to metrics" ON pipeline_training_metrics FOR ALL
  USING (auth.jwt() ->> 'role' = 'service_role');
CREATE TRIGGER update_pipeline_training_jobs_updated_at BEFORE UPDATE ON pipeline_training_jobs
  FOR EACH ROW EXECUTE FUNCTION update_updated_at_column();
